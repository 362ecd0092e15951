"""Scores over HTTP: OpenRLHF's POST /get_reward around whatever scores replies, with batching and limits.

    {"query": [text, …]}                      →  {"rewards": [number, …], "scores": …, "extra_logs": {}, "revision": …}

A query is a prompt with its reply, rendered by a chat template. What a client may add is read instead of the queries:

    {"query": …, "conversations": [{"prompt": [{"role": …, "content": …}, …], "reply": text, "ended": true}, …]}

so that a reward model renders the messages by its own template. `prompts` and `labels`, which OpenRLHF sends, too, are
not read. Source of the request and the reply: openrlhf/cli/serve_rm.py and openrlhf/utils/remote_rm_utils.py.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from stages.lib.command.errors import StageError, one_line


class AskedReply(BaseModel):
    """A prompt (messages, or text that the reply goes on from) and the reply to be scored."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: list[dict[str, Any]] | str
    reply: str
    ended: bool = True  # with EOS, rather than at a limit of tokens
    tools: list[dict[str, Any]] | None = None
    template_arguments: dict[str, Any] | None = None


Asked = AskedReply | str  # a query is text


class ScoreRequest(BaseModel):
    """What is read of a request's body."""

    model_config = ConfigDict(strict=True, extra="ignore")

    query: list[str]
    conversations: list[AskedReply] | None = None

    @property
    def asked(self) -> Sequence[Asked]:
        return self.query if self.conversations is None else self.conversations


class ServiceLimits(NamedTuple):
    """Beyond these a request is refused: one that is too large for good, one too many until others are done."""

    bytes_per_request: int
    rows_per_request: int
    rows_waiting: int  # of all requests together


Scorer = Callable[[Sequence[Asked]], list[float]]


class BatchedScores:
    """Scores requests one batch after another; what comes in while one is computed makes up the next."""

    def __init__(self, scorer: Scorer, limits: ServiceLimits) -> None:
        self.scorer = scorer
        self.limits = limits
        self.waiting_rows = 0
        self.queue: asyncio.Queue[tuple[Sequence[Asked], asyncio.Future[list[float]]]] = asyncio.Queue()

    async def scores(self, rows: Sequence[Asked]) -> list[float]:
        """The scores of one request. Raises HTTPException if too many wait, StageError if one cannot be scored."""
        if self.waiting_rows + len(rows) > self.limits.rows_waiting:
            raise HTTPException(503, f"{self.waiting_rows} rows are waiting; try again", {"Retry-After": "1"})
        answer: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self.waiting_rows += len(rows)
        self.queue.put_nowait((rows, answer))
        try:
            return await answer
        finally:
            self.waiting_rows -= len(rows)

    async def work(self) -> None:
        """Score what comes in, for ever, in one thread of its own."""
        with ThreadPoolExecutor(1) as thread:
            while True:
                batch = [await self.queue.get()]
                while not self.queue.empty():
                    batch.append(self.queue.get_nowait())
                asked = [rows for rows, _ in batch]
                results = await asyncio.get_running_loop().run_in_executor(thread, self.score_together, asked)
                for (_, answer), result in zip(batch, results, strict=True):
                    if answer.cancelled():
                        continue
                    if isinstance(result, Exception):
                        answer.set_exception(result)
                    else:
                        answer.set_result(result)

    def score_together(self, requests: Sequence[Sequence[Asked]]) -> list[list[float] | Exception]:
        """The scores of each request, or what was raised for it: one that cannot be scored takes no other with it."""
        try:
            scores = iter(self.scorer([row for rows in requests for row in rows]))
            return [[next(scores) for _ in rows] for rows in requests]
        except Exception as error:
            if len(requests) == 1:
                return [error]
            return [result for rows in requests for result in self.score_together([rows])]


def reward_service(scorer: Scorer, revision: str, limits: ServiceLimits, token: str | None) -> FastAPI:
    """The application.

    Args:
        scorer: gives a score for each row, or raises StageError; called in one thread.
        revision: of the model, which each reply states.
        token: that each request must bring as `Authorization: Bearer …`; None: any is served.
    """
    batched = BatchedScores(scorer, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(batched.work())
        yield
        working.cancel()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/get_reward")
    async def get_reward(request: Request) -> dict[str, Any]:
        require_token(request, token)
        asked = rows_asked(await body_of(request, limits.bytes_per_request), limits.rows_per_request)
        try:
            scores = await batched.scores(asked) if asked else []
        except StageError as error:
            raise HTTPException(400, one_line(str(error))) from None
        return {"rewards": scores, "scores": scores, "extra_logs": {}, "revision": revision}

    return app


def require_token(request: Request, token: str | None) -> None:
    """Raise HTTPException unless a request brings the token."""
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if token is not None and (kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode())):
        raise HTTPException(401, "Authorization: Bearer <token> is missing or wrong", {"WWW-Authenticate": "Bearer"})


async def body_of(request: Request, limit: int) -> bytes:
    """A request's body. Raises HTTPException as soon as it is known to be of more than `limit` bytes."""
    told = request.headers.get("content-length", "0")
    parts, size = [], int(told) if told.isdecimal() else 0
    if size <= limit:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                break
    if size > limit:
        raise HTTPException(413, f"the request has more than {limit} bytes; send fewer rows at a time")
    return b"".join(parts)


def rows_asked(body: bytes, limit: int) -> Sequence[Asked]:
    """The rows to score. Raises HTTPException for a body that is no such request, or has more than `limit` rows."""
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "body"
        raise HTTPException(422, one_line(f"{place}: {fault['msg']}")) from None
    if len(request.asked) != len(request.query):
        raise HTTPException(422, f"{len(request.query)} queries, and {len(request.asked)} conversations")
    if len(request.query) > limit:
        raise HTTPException(413, f"{len(request.query)} rows, and at most {limit} are scored at a time")
    return request.asked
