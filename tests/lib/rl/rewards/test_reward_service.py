"""Requests that wait are scored together; one that cannot be scored takes no other with it."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
from fastapi import HTTPException

from stages.lib.command.errors import StageError
from stages.lib.rl.rewards.reward_service import Asked, BatchedScores, ServiceLimits


class Lengths:
    """Scores a text by its length, once `go` is set; `batches` are the texts that it was given at a time."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Event()

    def __call__(self, rows: Sequence[Asked]) -> list[float]:
        texts = [row for row in rows if isinstance(row, str)]
        self.batches.append(texts)
        assert self.go.wait(10)
        if "bad" in texts:
            raise StageError("bad is not read")
        return [float(len(text)) for text in texts]


def test_what_comes_in_meanwhile_makes_up_the_next_batch() -> None:
    lengths = Lengths()

    async def ask() -> list[list[float] | BaseException]:
        batched = BatchedScores(lengths, ServiceLimits(1000, 10, rows_waiting=6))
        working = asyncio.create_task(batched.work())
        asked = [asyncio.create_task(batched.scores(["a"]))]
        while not lengths.batches:
            await asyncio.sleep(0.01)
        asked += [asyncio.create_task(batched.scores(rows)) for rows in (["bb", "ccc"], ["bad"], ["dddd", "e"])]
        await asyncio.sleep(0.05)
        with pytest.raises(HTTPException) as refused:
            await batched.scores(["f"])
        assert (refused.value.status_code, refused.value.detail) == (503, "6 rows are waiting; try again")
        lengths.go.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert batched.waiting_rows == 0
        working.cancel()
        return answers

    first, second, third, fourth = asyncio.run(ask())
    assert [first, second, fourth] == [[1.0], [2.0, 3.0], [4.0, 1.0]]
    assert isinstance(third, StageError)
    assert lengths.batches[:2] == [["a"], ["bb", "ccc", "bad", "dddd", "e"]]
    assert lengths.batches[2:] == [["bb", "ccc"], ["bad"], ["dddd", "e"]]
