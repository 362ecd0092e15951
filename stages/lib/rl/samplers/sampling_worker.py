"""Samples with our own sampler in a process of its own, while the stage goes on with its updates.

    python -m stages.lib.rl.samplers.sampling_worker

Started by `sampling_process.py`. It reads lines of JSON from stdin and writes lines of JSON:

    {"model": …, "settings": {…}, "lora": …, "precision": …, "runtime": {…}, "seed": …, "trust_remote_code": …}
        no answer
    {"weights": path, "prompts": [[row, ids], …], "step": …, "samples": …}
        → {"drawn": [[ids, log-probs or null, entropies or null, ended], …]}

or {"error": …}, with which it ends. `weights` holds all trained weights of the policy, by their names in its language
model. What is printed goes to stderr. The process ends with its stdin, or with the one that started it.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file

from stages.lib.command.errors import one_line
from stages.lib.compute.batching import micro_batching
from stages.lib.compute.processes import Processes, choose_device, make_deterministic
from stages.lib.data.chat import decode_completion, load_tokenizer
from stages.lib.data.prompts import Prompt
from stages.lib.models.lora import Lora
from stages.lib.models.pretrained import Loading, end_and_pad_ids, load_language_model
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.samplers.sampler_choice import SamplerSurroundings, own_sampler
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.settings.declaration import plain
from stages.lib.settings.lora import LoraSettings, quantization_of_base
from stages.lib.settings.runtime import Runtime
from stages.lib.settings.sampling import SamplingSettings


class Drawn(NamedTuple):
    """A response as JSON has it."""

    ids: list[int]
    logps: list[float] | None
    entropies: list[float] | None
    ended: bool


class SamplerStart(NamedTuple):
    """What a sampler is made of in a process that shares nothing with the stage."""

    model: str  # the folder that training starts from
    settings: SamplingSettings
    lora: LoraSettings | None
    precision: str
    runtime: Runtime
    seed: int
    trust_remote_code: bool

    def line(self) -> str:
        """As `read_start` reads it."""
        values = {name: plain(value) for name, value in self._asdict().items()}
        own = values["settings"]
        return json.dumps(values | {"settings": {name: own[name] for name in SamplingSettings.model_fields}})


def read_start(line: str) -> SamplerStart:
    values = json.loads(line)
    values["settings"] = SamplingSettings.model_validate(values["settings"])
    values["lora"] = None if values["lora"] is None else LoraSettings.model_validate(values["lora"])
    values["runtime"] = Runtime.model_validate(values["runtime"])
    return SamplerStart(**values)


class SamplingWorker:
    """The sampler, and the weights that it samples with."""

    def __init__(self, start: SamplerStart) -> None:
        runtime, model = start.runtime, Path(start.model)
        own = runtime.sampling_process
        if own.processors and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, own.processors)
        torch.set_num_threads(own.threads)
        make_deterministic()
        processes = Processes(0, 1, choose_device(runtime, 0))
        quantization, trusted = quantization_of_base(start.lora), start.trust_remote_code
        loading = Loading(start.precision, runtime, processes.device, quantization, trust_remote_code=trusted)
        language_model = load_language_model(model, loading)
        lora = Lora(language_model, start.lora, start.seed, model)
        self.weights = dict(language_model.named_parameters())
        log_probs = TokenLogProbs(language_model, chunk_tokens=runtime.logits_chunk_tokens)
        policy = TrainedPolicy(language_model, lora, cast(Any, log_probs), None)
        batching = micro_batching(runtime, end_and_pad_ids(model)[1], processes)
        decode = partial(decode_completion, load_tokenizer(model))
        nothing = ([], lambda: None, None, "")
        around = SamplerSurroundings(model, start.seed, loading, batching, decode, *nothing)
        self.sampler = own_sampler(policy, start.settings, around)

    def drawn(self, request: dict[str, Any]) -> list[Drawn]:
        """The responses that a request asks for."""
        with torch.no_grad():
            for name, weight in load_file(request["weights"]).items():
                self.weights[name].copy_(weight)
        prompts = [Prompt(row, ids, [], {}) for row, ids in request["prompts"]]
        episodes = self.sampler.sample(prompts, request["step"], request["samples"])
        return [Drawn(one.ids, one.engine_logps, one.engine_entropies, one.ended) for one in episodes]


def main() -> None:
    asked, out = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    try:
        worker = SamplingWorker(read_start(asked.readline()))
        for line in asked:
            say({"drawn": worker.drawn(json.loads(line))})
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        say({"error": one_line(f"{type(error).__name__}: {error}")})
        sys.exit(1)


if __name__ == "__main__":
    main()
