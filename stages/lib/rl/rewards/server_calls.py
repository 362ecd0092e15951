"""Questions to a server: several at a time, with a limit of time, and again after a while where that may help.

A server that is not there, is late or is busy (408, 425, 429, 5xx) is asked again; any other refusal is final.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, TypeVar

import httpx

from stages.lib.command.errors import StageError, one_line
from stages.lib.command.quoted import nearest
from stages.lib.compute.processes import Processes
from stages.lib.rl.rewards.scoring import Failure, RewardError, RewardScore
from stages.lib.settings.reward_servers import RewardServer
from stages.lib.settings.runtime import Runtime

BUSY = (408, 425, 429)
LONGEST_WAIT = 60.0  # seconds between two attempts
SHOWN = 200  # characters of an answer in a message
ToAsk = TypeVar("ToAsk")
Found = TypeVar("Found")


class NoAnswerError(Exception):
    """A server that gives no usable answer, and why, in one line."""

    def __init__(self, reason: str, kind: Literal["error", "timeout"] = "error") -> None:
        super().__init__(reason)
        self.failure = Failure(kind, one_line(reason))


class Caller:
    """Asks one server while its connections are open."""

    def __init__(self, client: httpx.AsyncClient, name: str, server: RewardServer) -> None:
        self.client = client
        self.server = server
        self.shown = f"reward server {name} ({server.address})"

    async def post(self, address: str, body: Any) -> Any:
        """The JSON of the answer. Raises NoAnswerError if there is none after all attempts."""
        fault, is_late = "", False
        for attempt in range(self.server.attempts):
            if attempt:
                await asyncio.sleep(min(self.server.backoff_seconds * 2 ** (attempt - 1), LONGEST_WAIT))
            is_late = False
            try:
                async with asyncio.timeout(self.server.timeout_seconds):
                    response = await self.client.post(address, json=body)
            except TimeoutError:
                fault, is_late = f"nothing came within {self.server.timeout_seconds:g} s", True
                continue
            except (httpx.RequestError, httpx.InvalidURL) as error:
                fault = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return self._json_of(response)
            fault = f"status {response.status_code}: {response.text[:SHOWN]}"
            if response.status_code not in BUSY and response.status_code < 500:
                raise NoAnswerError(f"{self.shown} refuses: {fault}")
        attempts = f"{self.server.attempts} attempt{'s' if self.server.attempts > 1 else ''}"
        raise NoAnswerError(
            f"{self.shown} gives no answer after {attempts}: {fault}", "timeout" if is_late else "error"
        )

    def _json_of(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise NoAnswerError(f"{self.shown} answers with no JSON: {response.text[:SHOWN]!r}") from None


class ServerCalls:
    """One server of runtime.yaml, by its name there.

    Raises:
        StageError: its token is to come from an environment variable that is not set.
    """

    def __init__(self, name: str, server: RewardServer) -> None:
        self.name = name
        self.server = server
        self.headers = authorization(name, server)

    def for_each(
        self, items: Sequence[ToAsk], ask: Callable[[Caller, ToAsk], Awaitable[Found]], *, stop_at_failure: bool
    ) -> list[Found | Failure]:
        """What `ask` returns for each item, or why it raised NoAnswerError.

        Args:
            stop_at_failure: the first failure is then that of all items that are not done.
        """
        return asyncio.run(self._for_each(items, ask, stop_at_failure=stop_at_failure)) if items else []

    async def _for_each(
        self, items: Sequence[ToAsk], ask: Callable[[Caller, ToAsk], Awaitable[Found]], *, stop_at_failure: bool
    ) -> list[Found | Failure]:
        at_a_time = self.server.parallel_requests
        room = asyncio.Semaphore(at_a_time)
        limits = httpx.Limits(max_connections=at_a_time)
        try:
            opened = httpx.AsyncClient(headers=self.headers, timeout=None, limits=limits)
        except (ImportError, ValueError, httpx.InvalidURL, OSError) as error:
            raise StageError(
                "what the environment says of proxies and certificates (ALL_PROXY, NO_PROXY, SSL_CERT_FILE) "
                f"cannot be used: {error}"
            ) from None
        async with opened as client:
            caller = Caller(client, self.name, self.server)

            async def one(item: ToAsk) -> Found | Failure:
                async with room:
                    try:
                        return await ask(caller, item)
                    except NoAnswerError as error:
                        if stop_at_failure:
                            raise
                        return error.failure

            tasks = [asyncio.ensure_future(one(item)) for item in items]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return outcomes(tasks)


def asked_by_main(processes: Processes, ask: Callable[[], list[RewardScore]]) -> list[RewardScore]:
    """What the main process learns from a server, in all processes. Raises a StageError of `ask` as RewardError."""
    try:
        found = processes.in_main(ask)
    except StageError as error:
        raise RewardError(str(error)) from None
    return processes.broadcast(found) or []


def outcomes(tasks: Sequence[asyncio.Task[Found]]) -> list[Found | Failure]:
    """What each task found; where one has failed, that is what all others give that are not done.

    Raises any other error.
    """
    errors = [None if task.cancelled() else task.exception() for task in tasks]
    for error in errors:
        if error is not None and not isinstance(error, NoAnswerError):
            raise error
    failures = [error.failure if isinstance(error, NoAnswerError) else None for error in errors]
    first = next((failure for failure in failures if failure is not None), None)
    found: list[Found | Failure] = []
    for task, own in zip(tasks, failures, strict=True):
        failure = first if task.cancelled() else own
        found.append(task.result() if failure is None else failure)
    return found


def authorization(name: str, server: RewardServer) -> dict[str, str]:
    """The header with the token of the environment. Raises StageError if it is to be there and is not."""
    variable = server.token_variable
    if variable is None:
        return {}
    token = os.environ.get(variable, "")
    if not token or not token.isascii() or not token.isprintable():
        raise StageError(
            f"runtime.yaml: reward_servers.{name}.token_variable: expected a token of ASCII characters in the "
            f"environment variable {variable}, which {'holds others' if token else 'is not set'}"
        )
    return {"Authorization": f"Bearer {token}"}


def server_calls(name: str, runtime: Runtime) -> ServerCalls:
    """The server that a reward names. Raises StageError if runtime.yaml has none of the name, or as `ServerCalls`."""
    if name not in runtime.reward_servers:
        raise StageError(
            f"runtime.yaml: reward_servers has no server '{name}', which a reward of params.yaml names"
            f"{nearest(name, runtime.reward_servers)}"
        )
    return ServerCalls(name, runtime.reward_servers[name])
