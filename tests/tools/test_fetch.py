"""`make fetch` against a Hub on loopback: what is fetched is whole, and a run without a network reads it."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.lib.settings.declaration import block
from stages.lib.settings.prepare_base import ModelOfHub
from stages.lib.settings.sections import default_params
from stages.lib.settings.sources import HubSource
from tests.hub_server import HubRepository, HubServer, hub_environment, repository_of_folder
from tests.loaded_python import loaded_python
from tests.stages.tiny_pipeline import PROJECT, contents, write_yaml
from tests.stages.tiny_qwen import save_qwen

DATA, DATA_COMMIT = "someone/questions", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
MODEL, MODEL_COMMIT = "someone/tiny-qwen", "060db6499f32faf8b98477b0a26969ef7d8b9987"
README = b"""---
configs:
- config_name: short
  data_files:
  - split: train
    path: short/*.jsonl
- config_name: long
  data_files: long/*.jsonl
---
"""


def lines(first: int, count: int) -> bytes:
    rows = ({"prompt": f"question {number}?", "completion": f"good {number}"} for number in range(first, first + count))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


DATA_FILES = {
    "README.md": README,
    "short/b.jsonl": lines(10, 10),
    "short/a.jsonl": lines(0, 10),
    "long/rows.jsonl": lines(100, 30),
    "one/train.jsonl": lines(200, 12),
    "one/test.jsonl": lines(300, 12),
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> list[HubRepository]:
    folder = tmp_path_factory.mktemp("model")
    save_qwen(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    model = repository_of_folder("models", MODEL, MODEL_COMMIT, folder)
    large = frozenset({"model.safetensors"})
    return [HubRepository("datasets", DATA, DATA_COMMIT, DATA_FILES), dataclasses.replace(model, large=large)]


@pytest.fixture(scope="module")
def hub(repositories: list[HubRepository]) -> Iterator[HubServer]:
    with HubServer(repositories) as server:
        yield server


def project(folder: Path, sources: dict[str, dict[str, Any]], models: dict[str, dict[str, Any]] | None = None) -> Path:
    """A project with these sources of the Hub, and models beside the new one."""
    folder.mkdir()
    params = default_params()
    source, base = {"dataset": DATA, "revision": DATA_COMMIT}, {"model": MODEL, "revision": MODEL_COMMIT}
    params["sources"]["hub"] = {name: block(HubSource, **source | values) for name, values in sources.items()}
    named = (models or {}).items()
    params["prepare_base"]["hub"] = {
        name: block(ModelOfHub, **base | values, eos_token="<|im_end|>") for name, values in named
    }
    write_yaml(folder / "params.yaml", params)
    for name in ("dvc.yaml", "runtime.yaml", "stages"):
        (folder / name).symlink_to(PROJECT / name)
    return folder


QWEN: dict[str, dict[str, Any]] = {"qwen": {}}


def fetch(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [*loaded_python(environment), "-m", "stages.tools.fetch"]
    environment = {**environment, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def read(folder: Path, name: str, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and messages of the stage that reads a source."""
    return stage(folder, environment, "read_source", name, "data/sources", "--metrics", "metrics/read_source")


def stage(folder: Path, environment: dict[str, str], script: str, name: str, out: str, *more: str) -> tuple[int, str]:
    command = [*loaded_python(environment), "-m", f"stages.{script}", "--name", name, "--out", out, *more]
    environment = {**environment, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def offline(cache: Path) -> dict[str, str]:
    """Where nobody listens, and without a try."""
    return hub_environment("http://127.0.0.1:9", cache) | {"HF_HUB_OFFLINE": "1"}


def test_what_was_fetched_is_read_without_a_network(hub: HubServer, tmp_path: Path) -> None:
    """As it is read with one."""
    sources = {
        "short": {"config": "short", "hub_split": "train[:15]"},
        "folder": {"config": "long", "max_rows": 3},
        "one": {"config": "short", "data_dir": None},
    }
    folder = project(tmp_path / "fetched", sources, QWEN)
    asked = len(hub.requests)
    done = fetch(folder, hub.environment(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    last = [line for line in done.stdout.splitlines() if "as the Hub has them" in line]
    assert [line.partition(",")[0] for line in last] == [
        "1/4 sources.hub.folder: 2 files",
        "2/4 sources.hub.one: 3 files",
        "3/4 sources.hub.short: 3 files",
        "4/4 prepare_base.hub.qwen: 6 files",
    ]
    got = [request for request in hub.requests[asked:] if request.startswith("GET /") and "/resolve/" in request]
    assert len({*got}) == len(got)  # each file once
    assert not any("/one/" in request or "pytorch_model" in request for request in got)
    online = project(tmp_path / "online", sources, QWEN)
    for where, environment in (
        (folder, offline(tmp_path / "cache")),
        (online, hub.environment(tmp_path / "other cache")),
    ):
        for name in ("short", "folder"):
            assert read(where, name, environment)[0] == 0
        assert stage(where, environment, "prepare_base", "qwen", "models")[0] == 0
    for out in ("data/sources", "models/qwen"):
        assert contents(folder / out) == contents(online / out)
    rows = [json.loads(line) for line in (folder / "data/sources/short/rows.jsonl").read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == [f"question {number}?" for number in range(15)]


def test_without_a_network_nothing_is_guessed(hub: HubServer, tmp_path: Path) -> None:
    """One configuration, or folder, is not another that lies in the same cache."""
    folder = project(tmp_path / "project", {"short": {"config": "short"}})
    cache = tmp_path / "cache"
    assert fetch(folder, hub.environment(cache)).returncode == 0
    again = fetch(folder, offline(cache))
    assert (again.returncode, again.stderr) == (
        2,
        "error: HF_HUB_OFFLINE is set, so nothing can be fetched; unset it\n",
    )
    other = project(tmp_path / "other", {"long": {"config": "long"}, "one": {"data_dir": "one"}})
    for name in ("long", "one"):
        code, errors = read(other, name, offline(cache))
        assert code == 2
        assert "is not in the cache, and HF_HUB_OFFLINE is set: run `make fetch` where there is a network" in errors
    (snapshot,) = cache.glob("hub/datasets--*/snapshots/*")
    (snapshot / "short/c.jsonl").write_bytes(lines(900, 1))
    code, errors = read(folder, "short", offline(cache))
    assert code == 2
    assert "in the cache it has other files than on the Hub, such as short/c.jsonl; remove" in errors
    (snapshot / "short/c.jsonl").unlink()
    os.truncate(snapshot / "short/b.jsonl", 100)
    code, errors = read(folder, "short", offline(cache))
    assert code == 2
    assert "run `make fetch`" in errors


def test_what_is_damaged_in_the_cache_is_fetched_again(
    hub: HubServer, repositories: list[HubRepository], tmp_path: Path
) -> None:
    folder = project(tmp_path / "project", {"short": {"config": "short"}}, QWEN)
    cache = tmp_path / "cache"
    assert fetch(folder, hub.environment(cache)).returncode == 0
    damaged = ["short/a.jsonl", "model.safetensors"]
    for name in damaged:
        (file,) = cache.glob(f"hub/*/snapshots/*/{name}")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1  # of the same size
        file.write_bytes(content)
    done = fetch(folder, hub.environment(cache))
    assert done.returncode == 0, done.stderr
    told = [line.strip().partition(":")[0] for line in done.stdout.splitlines() if "was damaged" in line]
    assert told == damaged
    for name, repository in zip(damaged, repositories, strict=True):
        (file,) = cache.glob(f"hub/*/snapshots/*/{name}")
        assert file.read_bytes() == repository.files[name]


class Liar(HubRepository):
    """Lists other contents than it serves."""

    def entry(self, path: str) -> dict[str, Any] | None:
        entry = super().entry(path)
        return entry and entry | {"oid": "0" * 40}


def test_each_item_that_cannot_be_had_is_one_line(repositories: list[HubRepository], tmp_path: Path) -> None:
    liar = Liar("datasets", "someone/liar", DATA_COMMIT, {"train.jsonl": lines(0, 5)})
    pickled = HubRepository("models", "someone/pickled", MODEL_COMMIT, {"config.json": b"{}", "model.bin": b""})
    sources = {
        "no-name": {"dataset": "someone/nobody"},
        "no-commit": {"revision": "f" * 40},
        "no-config": {"config": "none"},
        "no-split": {"config": "short", "hub_split": "validation[:3]"},
        "streamed": {"config": "short", "streaming": True},
        "liar": {"dataset": "someone/liar"},
        "good": {"config": "short"},
    }
    models = {"none": {"model": "someone/none"}, "pickled": {"model": "someone/pickled"}}
    folder = project(tmp_path / "project", sources, models)
    with HubServer([*repositories, liar, pickled]) as hub:
        done = fetch(folder, hub.environment(tmp_path / "cache"))
    assert done.returncode == 2
    errors = done.stderr.splitlines()
    says = {
        "sources.hub.liar": "train.jsonl differs from what the Hub says of it, also after it was fetched again",
        "sources.hub.no-commit": "could not be loaded from the Hub",
        "sources.hub.no-config": "'none' not found",
        "sources.hub.no-name": "could not be loaded from the Hub",
        "sources.hub.no-split": "it has no split validation, but train",
        "sources.hub.streamed": "set streaming: false to fetch it",
        "prepare_base.hub.none": "check the name, the revision and the network",
        "prepare_base.hub.pickled": "there are no weights in safetensors files",
    }
    assert len(errors) == len(says), done.stderr
    for line, (key, words) in zip(errors, says.items(), strict=True):
        assert line.startswith(f"error: params.yaml: {key}: ")
        assert words in line
    assert "1/9 sources.hub.good: 3 files" in done.stdout


def test_a_project_that_names_nothing_of_the_hub(tmp_path: Path) -> None:
    done = fetch(project(tmp_path / "project", {}), hub_environment("http://127.0.0.1:9", tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (0, "params.yaml names nothing of the Hub\n")
