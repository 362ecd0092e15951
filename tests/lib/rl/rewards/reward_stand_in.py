"""A server on loopback that answers as it is told to, also as no server should."""

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

from stages.lib.settings.declaration import block
from stages.lib.settings.reward_servers import RewardServer
from tests.loopback_server import LoopbackServer, QuietHandler


class Told(NamedTuple):
    """An answer."""

    body: Any  # bytes as they are, else a value as JSON
    status: int = 200
    late: float = 0.0  # seconds


class StandIn(LoopbackServer):
    """Answers request n (from 0) with a body as `answer(n, body)` says; `seen` are the bodies, with their headers."""

    def __init__(self, answer: Callable[[int, Any], Told]) -> None:
        self.answer = answer
        self.seen: list[tuple[str, dict[str, str], Any]] = []

    def handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in, lock = self, threading.Lock()

        class Handler(QuietHandler, BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.body()
                with lock:
                    number = len(stand_in.seen)
                    stand_in.seen.append((self.path, dict(self.headers), body))
                told = stand_in.answer(number, body)
                time.sleep(told.late)
                self.say(told.body, told.status)

        return Handler

    @property
    def address(self) -> str:
        return f"{self.origin}/get_reward"


def server_at(address: str, **changed: Any) -> RewardServer:
    return RewardServer(**block(RewardServer, address=address, **{"backoff_seconds": 0.01, **changed}))
