"""Requests to a server: several at a time, with a limit of time, and again after a while where that may help.

A server that is not there, is late or is busy (408, 429, 5xx) is asked again; any other refusal is final.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx

from stages.lib.command.errors import StageError, one_line
from stages.lib.settings.reward_servers import RewardServer

BUSY = (408, 425, 429)
LONGEST_WAIT = 60.0  # seconds between two attempts
SHOWN = 200  # characters of an answer in a message
Item = TypeVar("Item")
Found = TypeVar("Found")


class NoAnswerError(Exception):
    """A server that gives no usable answer, in one line."""


class ServerCalls:
    """One server of runtime.yaml, by its name there.

    Raises:
        StageError: its token is to come from an environment variable that is not set.
    """

    def __init__(self, name: str, server: RewardServer) -> None:
        self.name = name
        self.server = server
        self.headers: dict[str, str] = {}
        if server.token_variable is not None:
            token = os.environ.get(server.token_variable, "")
            if not token:
                raise StageError(
                    f"runtime.yaml: reward_servers.{name}.token_variable: the environment variable "
                    f"{server.token_variable} is not set"
                )
            if not token.isascii() or not token.isprintable():
                raise StageError(f"environment variable {server.token_variable}: expected a token of ASCII characters")
            self.headers["Authorization"] = f"Bearer {token}"

    def for_each(self, items: Sequence[Item], ask: "Callable[[Caller, Item], Awaitable[Found]]") -> list[Found]:
        """What `ask` returns for each item; with the first error all that is still under way is dropped."""
        return asyncio.run(self._for_each(items, ask))

    async def _for_each(self, items: Sequence[Item], ask: "Callable[[Caller, Item], Awaitable[Found]]") -> list[Found]:
        room = asyncio.Semaphore(self.server.parallel_requests)

        async def one(caller: Caller, item: Item) -> Found:
            async with room:
                return await ask(caller, item)

        limits = httpx.Limits(max_connections=self.server.parallel_requests)
        async with httpx.AsyncClient(headers=self.headers, timeout=self.server.timeout_seconds, limits=limits) as client:
            caller = Caller(client, self.name, self.server)
            tasks = [asyncio.ensure_future(one(caller, item)) for item in items]
            try:
                return [*await asyncio.gather(*tasks)]
            finally:
                for task in tasks:
                    task.cancel()


class Caller:
    """Asks one server while its connections are open."""

    def __init__(self, client: httpx.AsyncClient, name: str, server: RewardServer) -> None:
        self.client = client
        self.server = server
        self.shown = f"reward server {name} ({server.address})"

    async def post(self, address: str, body: Any) -> Any:
        """The JSON of the answer. Raises NoAnswerError if there is none after all attempts."""
        fault = ""
        for attempt in range(self.server.attempts):
            if attempt:
                await asyncio.sleep(min(self.server.backoff_seconds * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                async with asyncio.timeout(self.server.timeout_seconds):
                    response = await self.client.post(address, json=body)
            except TimeoutError:
                fault = f"no answer within {self.server.timeout_seconds:g} s"
                continue
            except httpx.TransportError as error:
                fault = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                continue
            if response.is_success:
                return self._json_of(response)
            fault = f"status {response.status_code}: {response.text[:SHOWN]}"
            if response.status_code not in BUSY and response.status_code < 500:
                raise NoAnswerError(one_line(f"{self.shown} refuses: {fault}"))
        attempts = f"{self.server.attempts} attempt{'s' if self.server.attempts > 1 else ''}"
        raise NoAnswerError(one_line(f"{self.shown} gives no answer, after {attempts}: {fault}"))

    def _json_of(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError:
            raise NoAnswerError(one_line(f"{self.shown} answers with no JSON: {response.text[:SHOWN]!r}")) from None
