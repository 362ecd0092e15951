"""A small server on loopback that speaks as much of the Hugging Face Hub's protocol as downloading takes.

Give its address to a subprocess as HF_ENDPOINT (`HubServer.environment`), and the unmodified loading code of datasets,
huggingface_hub and transformers works against it. Files are served as those of one commit, large
(LFS) ones like the others.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.loopback_server import LoopbackServer


@dataclass(frozen=True)
class HubRepository:
    """A repository with a single commit."""

    kind: str  # "datasets" or "models", as in the addresses of the API
    name: str  # owner/name
    commit: str  # 40 hexadecimal digits
    files: dict[str, bytes]
    large: frozenset[str] = frozenset()  # paths of files that are kept apart from it, known by their SHA-256

    def revisions(self) -> tuple[str, ...]:
        return ("main", self.commit)

    def info(self) -> dict[str, Any]:
        return {
            "_id": self.commit[:24],
            "id": self.name,
            "modelId": self.name,
            "sha": self.commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2024-01-01T00:00:00.000Z",
            "createdAt": "2024-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(self.files)],
        }

    def entry(self, path: str) -> dict[str, Any] | None:
        """One file or folder as the tree and paths-info routes describe it; None if there is no such path."""
        if path in self.files:
            content = self.files[path]
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            kept_apart = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
            return entry | ({"lfs": kept_apart} if path in self.large else {})
        if any(file.startswith(f"{path}/") for file in self.files):
            return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
        return None

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        paths = set()
        for file in self.files:
            if file.startswith(prefix):
                parts = file[len(prefix) :].split("/")
                depth = len(parts) if recursive else 1
                paths |= {prefix + "/".join(parts[:count]) for count in range(1, depth + 1)}
        return [self.entry(path) for path in sorted(paths)]


def blob_id(content: bytes) -> str:
    """The id that Git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def repository_of_folder(kind: str, name: str, commit: str, folder: Path) -> HubRepository:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return HubRepository(kind, name, commit, files)


class HubServer(LoopbackServer):
    """Serves repositories from a thread while the `with` block runs. `requests` lists what was asked for."""

    def __init__(self, repositories: Iterable[HubRepository]) -> None:
        self.repositories = {(repository.kind, repository.name): repository for repository in repositories}
        self.requests: list[str] = []

    def handler(self) -> type[BaseHTTPRequestHandler]:
        return handler_for(self)

    @property
    def endpoint(self) -> str:
        return self.origin

    def environment(self, home: Path) -> dict[str, str]:
        """This process's environment, with this server as the Hub and an empty cache below `home`."""
        return hub_environment(self.endpoint, home)


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """An environment in which the Hub is at `endpoint`, and nothing of the user's own set-up or cache is seen."""
    dropped = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    kept = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


API = re.compile(r"/api/(?P<kind>datasets|models)/(?P<name>[^/]+/[^/]+)(?:/(?P<route>[^/]+)/(?P<rest>.+?))?/?$")
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


def handler_for(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None:
            """Stay silent."""

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            address = urlsplit(self.path)
            path = unquote(address.path)
            hub.requests.append(f"{self.command} {self.path}")
            if found := FILE.fullmatch(path):
                kind = "datasets" if found["kind"] else "models"
                self.answer_file(kind, found["name"], found["revision"], found["path"])
            elif found := API.fullmatch(path):
                self.answer_api(found, parse_qs(address.query), body)
            else:
                self.refuse("EntryNotFound", "no such route")

        def answer_file(self, kind: str, name: str, revision: str, path: str) -> None:
            repository = self.repository(kind, name, revision)
            if repository is None:
                return
            if path not in repository.files:
                self.refuse("EntryNotFound", f"{path} does not exist", repository)
                return
            content = repository.files[path]
            headers = {"ETag": f'"{blob_id(content)}"', "Accept-Ranges": "bytes"}
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                start, end = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
                self.send(206, content[start : end + 1], "application/octet-stream", repository, headers)
            else:
                self.send(200, content, "application/octet-stream", repository, headers)

        def answer_api(self, found: re.Match, query: dict[str, list[str]], body: bytes) -> None:
            route, rest = found["route"], found["rest"] or "main"
            revision, _, path = (rest, "", "") if route == "revision" else rest.partition("/")
            repository = self.repository(found["kind"], found["name"], revision)
            if repository is None:
                return
            if route in (None, "revision"):
                self.send_json(repository.info(), repository)
            elif route == "tree" and (not path or repository.entry(path)):
                recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                self.send_json(repository.tree(path, recursive), repository)
            elif route == "paths-info":
                self.send_json([entry for entry in map(repository.entry, paths_of(body)) if entry], repository)
            else:
                self.refuse("EntryNotFound", f"{path} does not exist", repository)

        def repository(self, kind: str, name: str, revision: str) -> HubRepository | None:
            """The repository at the revision; otherwise refuses the request as the Hub does, and returns None."""
            repository = hub.repositories.get((kind, name))
            if repository is None:
                self.refuse("RepoNotFound", "Repository not found")
            elif revision not in repository.revisions():
                self.refuse("RevisionNotFound", f"Invalid rev id: {revision}")
                return None
            return repository

        def refuse(self, code: str, message: str, repository: HubRepository | None = None) -> None:
            body = json.dumps({"error": message}).encode()
            self.send(404, body, "application/json", repository, {"X-Error-Code": code, "X-Error-Message": message})

        def send_json(self, value: Any, repository: HubRepository) -> None:
            self.send(200, json.dumps(value).encode(), "application/json", repository, {})

        def send(
            self, status: int, body: bytes, kind: str, repository: HubRepository | None, headers: dict[str, str]
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if repository is not None:
                self.send_header("X-Repo-Commit", repository.commit)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def paths_of(body: bytes) -> list[str]:
    """The paths that a paths-info request asks for, sent as a form or as JSON."""
    text = body.decode()
    values = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
    return [values] if isinstance(values, str) else values
