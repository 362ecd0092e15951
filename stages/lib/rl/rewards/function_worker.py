"""Runs a reward function in a process of its own, where it may hang, crash or print without harm to the stage.

    function_worker.py MODULE FUNCTION FOLDER…

Started by `worker_pool.py`, with the folders that modules are looked for in. It imports nothing of ours but what the
function imports. It first writes what it found, then reads requests from stdin and writes answers, each a line of JSON:

    → {"reads": [names of arguments] | null, "needs": [names], "is_async": …, "versions": {…}} | {"error": …}
    {"id": …, "arguments": {…}}  →  {"id": …, "score": number | null} | {"id": …, "error": …, "kind": …}

`reads` is null where it takes whatever there is (**), `needs` are those without a default. Awaitable scores are awaited
side by side. Who prints, prints to stderr, and who reads stdin finds its end. The process ends with the one that holds
its real stdin, whatever it is doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import inspect
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

LONGEST_REASON = 500
# The tasks grade responses: that exists to measure policies, and none may be trained on it.
NOT_FOR_TRAINING = "stages.lib.tasks"


def main() -> None:
    module, name, *folders = sys.argv[1:]
    end_with_parent()
    asked, out = os.fdopen(os.dup(0), "rb"), Answers(os.dup(1))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # else the function, or what it starts, could read requests
    os.dup2(2, 1)
    sys.path[:0] = folders
    sys.modules[NOT_FOR_TRAINING] = None  # pyrefly: ignore[unsupported-operation]  # importing it then fails
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    try:
        function = getattr(importlib.import_module(module), name)
        out.write({**arguments_of(function), "is_async": is_async(function), "versions": versions_of_imports()})
    except BaseException as error:  # of the user's code, sys.exit among them
        out.write({"error": told_error(error)})
        return
    if is_async(function):
        asyncio.run(answer_side_by_side(function, asked, out))
        return
    threading.Thread(target=read_requests, args=(asked, requests.put), daemon=True).start()
    while True:
        request = requests.get()
        try:
            out.write(answered_with(request, function(**request["arguments"])))
        except BaseException as error:
            out.write(failed(request, error))


def end_with_parent() -> None:
    """Have Linux end this process with the one that started it, also while no thread can read stdin."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Answers:
    """Where answers are written, by the process that was asked alone: not by one that the function forked."""

    def __init__(self, place: int) -> None:
        self.place, self.process = place, os.getpid()

    def write(self, answer: dict[str, Any]) -> None:
        if os.getpid() != self.process:
            os._exit(0)
        try:
            rest = json.dumps(answer).encode() + b"\n"
            while rest:
                rest = rest[os.write(self.place, rest) :]
        except OSError:  # who asked has ended
            os._exit(1)


def read_requests(asked: BinaryIO, put: Callable[[dict[str, Any]], Any]) -> None:
    """In a thread, so that the end of stdin ends the process in the middle of the function."""
    for line in asked:
        put(json.loads(line))
    os._exit(0)


def arguments_of(function: Callable) -> dict[str, Any]:
    """Those that it reads, and those that it needs."""
    parameters = [*inspect.signature(function).parameters.values()]
    named = [one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    reads_all = any(one.kind == one.VAR_KEYWORD for one in parameters)
    return {
        "reads": None if reads_all else [one.name for one in named],
        "needs": [one.name for one in named if one.default is one.empty],
    }


def is_async(function: Callable) -> bool:
    return inspect.iscoroutinefunction(function)


async def answer_side_by_side(function: Callable, asked: BinaryIO, out: Answers) -> None:
    loop = asyncio.get_running_loop()
    tasks = set()

    async def answer(request: dict[str, Any]) -> None:
        try:
            out.write(answered_with(request, await function(**request["arguments"])))
        except BaseException as error:
            out.write(failed(request, error))

    def begin(request: dict[str, Any]) -> None:
        task = loop.create_task(answer(request))
        tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(tasks.discard)

    def put(request: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(begin, request)

    threading.Thread(target=read_requests, args=(asked, put), daemon=True).start()
    await asyncio.Event().wait()


def answered_with(request: dict[str, Any], score: Any) -> dict[str, Any]:
    if isinstance(score, str | bytes):
        raise TypeError(f"the score must be a number or None, found {type(score).__name__}")
    return {"id": request["id"], "score": None if score is None else float(score)}


def failed(request: dict[str, Any], error: BaseException) -> dict[str, Any]:
    return {
        "id": request["id"],
        "error": told_error(error),
        "kind": "row" if getattr(error, "kind", "") == "row" else "error",
    }


def told_error(error: BaseException) -> str:
    """One line: what was raised, and where in the user's own code."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    place = next((frame for frame in reversed(own) if Path(frame.filename).is_relative_to(Path.cwd())), None)
    where = f" ({os.path.relpath(place.filename)}, line {place.lineno})" if place else ""
    try:
        text = " ".join(str(error).split())[:LONGEST_REASON]
    except Exception as other:
        text = f"its message cannot be read ({type(other).__name__})"
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"


def versions_of_imports() -> dict[str, str]:
    """The versions of the packages that have been imported, by their names."""
    from importlib.metadata import packages_distributions, version

    imported = {name.partition(".")[0] for name in sys.modules}
    known = packages_distributions()
    return {package: version(package) for name in sorted(imported & known.keys()) for package in known[name]}


if __name__ == "__main__":
    main()
