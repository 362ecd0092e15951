"""Processes that start with the libraries loaded and nothing else, each forked from a server that only imports them.

A process of its own costs half a second then instead of the many that torch and transformers take to load.
"""

import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

LOADED = (
    "benchmarks.random_models",
    "benchmarks.timed_steps",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
)


def run_module(module: str, arguments: list[str], log: Path, deadline: float) -> int | None:
    """Call `main` of a module with `arguments`, its output added to `log`.

    Args:
        deadline: by `time.monotonic()`; the process is killed then.
    Returns:
        Its exit code, negative for a signal; None if the deadline ended it.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Without it a library that asks at import whether there is a GPU spoils CUDA for forked processes.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    process = context.Process(target=_child, args=(module, arguments, log), daemon=True)
    process.start()
    process.join(max(0.0, deadline - time.monotonic()))
    if not process.is_alive():
        return process.exitcode
    process.kill()
    process.join()
    return None


def _child(module: str, arguments: list[str], log: Path) -> None:
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    import torch

    if torch.cuda._is_in_bad_fork():  # a library did spoil it: begin with an empty process
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    importlib.import_module(module).main(*arguments)
