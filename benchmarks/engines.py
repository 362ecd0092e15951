"""What samples how fast: `generate`, our sampler, transformers' continuous batching, and a vLLM server.

    python -m benchmarks.engines --vllm /opt/vllm/bin/vllm --model models/sft --prompts data/tokens/train/prompts.arrow

Each answers the same prompts once, at temperature 1, with the same limit of tokens, in a warm process, `--rounds` times
of which the best counts. Tokens of responses per second, by the clock, and by the time of processors, which on a busy
machine is the steadier one; that of a vLLM server is the sum over its processes and this one, which waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, NamedTuple

import psutil
import torch
import typer

from benchmarks.sampling import given_model, given_prompts
from stages.lib.command.run import run
from stages.lib.compute.batching import pad_left, pass_cost_of
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import Prompt
from stages.lib.models.pretrained import end_and_pad_ids
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.samplers.continuous import ContinuousSampler
from stages.lib.rl.samplers.own import OwnSampler
from stages.lib.rl.samplers.served_weights import write_served_model
from stages.lib.rl.samplers.vllm_connection import Completion
from stages.lib.rl.samplers.vllm_process import VllmProcess
from stages.lib.settings.declaration import block
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_grpo import TrainGrpo
from stages.lib.settings.vllm_server import VllmServer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 17
CPU = Processes(0, 1, torch.device("cpu"))
Answering = Callable[[list[Prompt], int], int]  # prompts, a number of the round → tokens of the responses


class Rate(NamedTuple):
    """Tokens of responses per second."""

    by_clock: float
    by_processors: float


def main(
    model: Annotated[Path, typer.Option(help="folder of a language model")],
    prompts: Annotated[Path, typer.Option(help="table of prompts of its tokens")],
    vllm: Annotated[str, typer.Option(help="program of vLLM; none: it is left out")] = "",
    sequences: Annotated[str, typer.Option(help="under way together, with commas")] = "16,128,512",
    new_tokens: Annotated[int, typer.Option(help="at most, of a response")] = 64,
    rounds: Annotated[int, typer.Option(help="of which the best counts")] = 2,
    threads: Annotated[int, typer.Option(help="of each in this process")] = 1,
) -> None:
    """Print a table of rates."""
    torch.set_num_threads(threads)
    sizes = [int(size) for size in sequences.split(",")]
    language_model, asked = given_model(model), given_prompts(prompts, max(sizes))
    engines = in_process(language_model, model, new_tokens)
    with TemporaryDirectory() as folder:
        server = started(vllm, language_model, model, Path(folder)) if vllm else None
        try:
            if server:
                engines["vLLM"] = partial_vllm(server, end_and_pad_ids(model)[0], new_tokens)
            print("| sequences | " + " | ".join(f"{name}: tokens/s | /s of processors" for name in engines) + " |")
            print("|---" * (1 + 2 * len(engines)) + "|")
            for size in sizes:
                own = [asked[place % len(asked)] for place in range(size)]
                rates = [rate_of(answer, own, rounds, server) for answer in engines.values()]
                cells = [f"{value:,.0f}" for rate in rates for value in rate]
                print(f"| {size} | {' | '.join(cells)} |", flush=True)
        finally:
            if server:
                server.end()


def in_process(model: PreTrainedModel, folder: Path, new_tokens: int) -> dict[str, Answering]:
    """What samples in this process, by name."""
    eos_id, pad_id = end_and_pad_ids(folder)
    budget = MemoryBudget("generation_batch_size", 128)
    settings = TrainGrpo(**block(TrainGrpo, max_new_tokens=new_tokens))
    cost = pass_cost_of(read_runtime("train_grpo"), CPU.device)
    options = (SEED, 1.0, new_tokens, eos_id, pad_id, str, budget, CPU)
    own = OwnSampler(TokenLogProbs(model), model, *options, cost=cost)
    continuous = ContinuousSampler(model, settings, SEED, eos_id, pad_id, str, MemoryBudget("", 512))

    def by_generate(prompts: list[Prompt], _: int) -> int:
        ids, mask = pad_left([prompt.ids for prompt in prompts], pad_id, CPU.device)
        with torch.no_grad():
            found = model.generate(
                ids,
                attention_mask=mask.long(),
                do_sample=True,
                top_k=0,
                max_new_tokens=new_tokens,
                eos_token_id=eos_id,
                pad_token_id=pad_id,
            )
        rows = found[:, ids.shape[1] :].tolist()
        return sum(row.index(eos_id) + 1 if eos_id in row else len(row) for row in rows)

    return {
        "generate": by_generate,
        "ours": lambda prompts, step: sum(len(episode.ids) for episode in own.sample(prompts, step)),
        "continuous batching": lambda prompts, step: sum(len(one.ids) for one in continuous.sample(prompts, step)),
    }


def started(program: str, model: PreTrainedModel, folder: Path, home: Path) -> VllmProcess:
    """A server of the model."""
    write_served_model(model.state_dict(), folder, home / "served", "fp32")
    options = ["--enforce-eager", "--max-num-seqs", "512"]
    server = VllmServer(**block(VllmServer, program=program, options=options))
    arguments = [str(home / "served"), "--dtype", "float32", "--generation-config", "vllm"]
    return VllmProcess(server, arguments, {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}, home / "log")


def partial_vllm(server: VllmProcess, eos_id: int, new_tokens: int) -> Answering:
    """Asks the server as the sampler does, several prompts a request."""
    together = server.connection.server.prompts_per_request

    def by_vllm(prompts: list[Prompt], _: int) -> int:
        parts = [prompts[start : start + together] for start in range(0, len(prompts), together)]
        own = {"max_tokens": new_tokens, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop_token_ids": [eos_id]}
        found: list[Completion] = []
        requests = [{"prompt": [prompt.ids for prompt in part], "n": 1, **own} for part in parts]
        server.connection.complete(requests, lambda _, completions: found.extend(completions))
        return sum(len(completion.ids) for completion in found)

    return by_vllm


def rate_of(answer: Answering, prompts: list[Prompt], rounds: int, server: VllmProcess | None) -> Rate:
    """The best of some rounds, after one that is not counted."""
    answer(prompts[:16], 0)
    found = []
    for number in range(1, rounds + 1):
        started_at, processors = time.perf_counter(), seconds_of_processors(server)
        tokens = answer(prompts, number)
        seconds = time.perf_counter() - started_at, seconds_of_processors(server) - processors
        found.append(Rate(*(tokens / own for own in seconds)))
    return Rate(max(rate.by_clock for rate in found), max(rate.by_processors for rate in found))


def seconds_of_processors(server: VllmProcess | None) -> float:
    """So far, of this process and of a server's."""
    others: Sequence[psutil.Process] = []
    if server:
        parent = psutil.Process(server.process.pid)
        others = [parent, *parent.children(recursive=True)]
    return time.process_time() + sum(sum(other.cpu_times()[:2]) for other in others)


if __name__ == "__main__":
    run(main)
