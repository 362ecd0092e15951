"""A server on loopback that answers as it is told to, also as no server should."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from stages.lib.settings.declaration import block
from stages.lib.settings.reward_servers import RewardServer


class Told(NamedTuple):
    """An answer."""

    body: Any  # bytes as they are, else a value as JSON
    status: int = 200
    late: float = 0.0  # seconds


class StandIn:
    """Answers request n (from 0) with a body as `answer(n, body)` says; `seen` are the bodies, with their headers."""

    def __init__(self, answer: Callable[[int, Any], Told]) -> None:
        self.answer = answer
        self.seen: list[tuple[str, dict[str, str], Any]] = []

    def __enter__(self) -> "StandIn":
        stand_in, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(stand_in.seen)
                    stand_in.seen.append((self.path, dict(self.headers), body))
                told = stand_in.answer(number, body)
                time.sleep(told.late)
                content = told.body if isinstance(told.body, bytes) else json.dumps(told.body).encode()
                self.send_response(told.status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Stay silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that has gone
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/get_reward"


def server_at(address: str, **changed: Any) -> RewardServer:
    return RewardServer(**block(RewardServer, address=address, **{"backoff_seconds": 0.01, **changed}))
