"""The process that samples a phase ahead with our own sampler; see `sampling_worker.py`."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stages.lib.command.errors import one_line
from stages.lib.data.prompts import Prompt
from stages.lib.rl.samplers import sampling_worker
from stages.lib.rl.samplers.sampler import SamplerError
from stages.lib.rl.samplers.sampling_worker import Drawn, SamplerStart
from stages.lib.rl.samplers.vllm_process import LAUNCH_VARIABLES, end_after_parent, end_group

PROJECT = Path(__file__).resolve().parents[4]


class SamplingProcess:
    """One process with a copy of the policy, loaded while the stage goes on. It has one request in hand at a time.

    Args:
        weights: the file through which it gets the policy's weights.
    """

    def __init__(self, start: SamplerStart, weights: Path) -> None:
        self.weights = weights
        self.unread = b""
        runtime = start.runtime.sampling_process
        own = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
        own["PYTHONPATH"] = os.pathsep.join([str(PROJECT), *filter(None, [own.get("PYTHONPATH")])])
        if runtime.visible_gpus is not None:
            own["CUDA_VISIBLE_DEVICES"] = runtime.visible_gpus
        self.process = subprocess.Popen(
            [sys.executable, "-m", sampling_worker.__spec__.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=own,
            start_new_session=True,  # Ctrl-C is for the stage
            preexec_fn=end_after_parent if sys.platform == "linux" else None,
        )
        self.end = weakref.finalize(self, end_group, self.process)
        self._write(start.line())

    def begin(self, weights: Mapping[str, torch.Tensor], prompts: Sequence[Prompt], step: int, samples: int) -> None:
        """Ask for responses from a policy with these weights; `take` gives them."""
        self.weights.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(weights), self.weights)
        request = {"weights": str(self.weights), "step": step, "samples": samples}
        self._write(json.dumps(request | {"prompts": [[prompt.row, prompt.ids] for prompt in prompts]}))

    def is_ready(self, seconds: float) -> bool:
        """Whether `take` has something to read now, or within this many seconds."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            return bool(selector.select(seconds))

    def take(self) -> list[Drawn]:
        """The responses that were asked for last, once they are there. Raises SamplerError if it has failed."""
        answer = self._read()
        if "error" in answer:
            raise SamplerError(f"the process that samples a phase ahead has failed: {one_line(answer['error'])}")
        return [Drawn(*response) for response in answer["drawn"]]

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.end()
        self.weights.unlink(missing_ok=True)

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which reading its answer will say
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while b"\n" not in self.unread:
            given = os.read(self.process.stdout.fileno(), 2**20)
            if not given:
                status = self.process.wait()
                ended = f"the process that samples a phase ahead has ended with {status}"
                raise SamplerError(f"{ended}; start the stage again")
            self.unread += given
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)
