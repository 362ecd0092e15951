"""Our own sampler beside transformers' `generate`: the same model, prompts, random numbers and tokens.

    python -m benchmarks.sampling                                                         a random model
    python -m benchmarks.sampling --model models/sft --prompts data/tokens/train/prompts.arrow

Each is given a phase of rollouts, in turn, `--rounds` times, on as many threads; what is compared is the time of
processors, of the best round of each. `generate` samples as it always does, from one batch padded to the longest
prompt, in the order of the phase; a processor of its logits then puts our token in the place of its own, so that both
decode the same rows equally long. Those tokens are drawn from the logits of `generate` by our random numbers, which
shows that they are the same. The time that this takes is not counted.

- share of the peak: FLOPs that the mathematics asks for, each prompt counted once, by the time and the rate of a large
  product of matrices on as many threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch import nn

from benchmarks.model_flops import Architecture, forward_flops
from benchmarks.our_steps import matrix_flops
from stages.lib.command.run import run
from stages.lib.compute.batching import pad_left, pass_cost_of
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import Prompt, prompts_of
from stages.lib.data.token_tables import PROMPT_SCHEMA, read_table
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.samplers.own import OwnSampler
from stages.lib.rl.sampling import invert_distribution, uniform_draws
from stages.lib.settings.runtime import read_runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# As params.yaml: prepare_base of the default run has it.
SHAPE = Architecture(layers=3, hidden=128, heads=4, key_value_heads=4, intermediate=344, vocabulary=1024)
MEAN_LENGTH = 24  # of a response of the default run
PROMPT_LENGTHS = (20, 60)  # of the random model's prompts
EOS, PAD, SEED = 0, 1, 17


class Contest(NamedTuple):
    """What both are given."""

    model: PreTrainedModel
    prompts: list[Prompt]
    samples: int  # of each prompt
    new_tokens: int  # at most, of a response
    ids: tuple[int, int]  # of EOS and padding


class Measured(NamedTuple):
    """Of one of the two."""

    seconds: float  # of processors, in the best round
    responses: list[list[int]]


def main(
    model: Annotated[Path | None, typer.Option(help="folder of a language model; none: random weights")] = None,
    prompts: Annotated[Path | None, typer.Option(help="table of prompts of its tokens; none: random ones")] = None,
    responses: Annotated[int, typer.Option(help="of a phase")] = 128,
    new_tokens: Annotated[int, typer.Option(help="at most, of a response")] = 64,
    rounds: Annotated[int, typer.Option(help="of which the best counts")] = 5,
    threads: Annotated[int, typer.Option(help="of both")] = 1,
) -> None:
    """Time sampling, with a prompt's response alone and in groups of eight."""
    torch.set_num_threads(threads)
    language_model = random_model() if model is None else given_model(model)
    peak = matrix_flops()
    print(f"{threads} threads, a product of matrices makes {peak / 1e9:.0f} GFLOP/s, {rounds} rounds\n")
    print("| samples a prompt | generate, s | ours, s | times | generate, share of peak | ours | same responses |")
    print("|---|---|---|---|---|---|---|")
    for samples in (1, 8):
        asked = (
            random_prompts(responses // samples) if prompts is None else given_prompts(prompts, responses // samples)
        )
        config: Any = language_model.config
        contest = Contest(language_model, asked, samples, new_tokens, (config.eos_token_id, config.pad_token_id))
        print(row_of(contest, *measured(contest, rounds), peak * threads), flush=True)


def random_model(positions: int = 192) -> PreTrainedModel:
    """Of the default run's shape; a response ends after 24 tokens, on average, by the bias of its head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocabulary,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.key_value_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.lm_head = nn.Linear(SHAPE.hidden, SHAPE.vocabulary)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.02)
        model.lm_head.bias.zero_()[EOS] = math.log(SHAPE.vocabulary / (MEAN_LENGTH - 1))
    return model.eval()


def given_model(path: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, use_safetensors=True).eval()


def random_prompts(count: int) -> list[Prompt]:
    chance = np.random.Generator(np.random.Philox(SEED))
    lengths = chance.integers(*PROMPT_LENGTHS, endpoint=True, size=count)
    return [
        Prompt(row, chance.integers(2, SHAPE.vocabulary, size=length).tolist(), [], {})
        for row, length in enumerate(lengths)
    ]


def given_prompts(path: Path, count: int) -> list[Prompt]:
    table = read_table(path, PROMPT_SCHEMA)
    return prompts_of(table[list(range(min(count, len(table))))])


def measured(contest: Contest, rounds: int) -> tuple[Measured, Measured]:
    """`generate`, and ours."""
    found: dict[Callable, list[Measured]] = {by_generate: [], by_ours: []}
    for _ in range(1 + rounds):
        for sample, results in found.items():
            results.append(sample(contest))
    theirs, ours = (min(results[1:], key=lambda one: one.seconds) for results in found.values())
    return theirs, ours


def by_ours(contest: Contest) -> Measured:
    eos_id, pad_id = contest.ids
    policy = TokenLogProbs(contest.model)
    processes = Processes(0, 1, torch.device("cpu"))
    budget = MemoryBudget("generation_batch_size", 128)
    options = (SEED, 1.0, contest.new_tokens, eos_id, pad_id, str, budget, processes)
    cost = pass_cost_of(read_runtime("train_grpo"), processes.device)
    sampler = OwnSampler(policy, contest.model, *options, cost=cost)
    started = time.process_time()
    episodes = sampler.sample(contest.prompts, 0, contest.samples)
    return Measured(time.process_time() - started, [episode.ids for episode in episodes])


class Forced:
    """Puts the token that our random numbers draw from the logits in the place of what `generate` would draw."""

    def __init__(self, contest: Contest) -> None:
        places = [(place, sample) for place in range(len(contest.prompts)) for sample in range(contest.samples)]
        draws = [uniform_draws(SEED, 0, place, contest.new_tokens, sample) for place, sample in places]
        self.uniform = torch.from_numpy(np.stack(draws))
        self.token = 0
        self.seconds = 0.0

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        started = time.process_time()
        tokens = invert_distribution(scores, self.uniform[:, self.token], 1.0)
        forced = torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
        self.token += 1
        self.seconds += time.process_time() - started
        return forced


def by_generate(contest: Contest) -> Measured:
    from transformers import LogitsProcessorList

    eos_id, pad_id = contest.ids
    forced = Forced(contest)
    started = time.process_time()
    ids, mask = pad_left([prompt.ids for prompt in contest.prompts], pad_id, torch.device("cpu"))
    with torch.no_grad():
        found = contest.model.generate(
            ids,
            attention_mask=mask.long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=contest.samples,
            max_new_tokens=contest.new_tokens,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            logits_processor=LogitsProcessorList([forced]),
        )
    rows = found[:, ids.shape[1] :].tolist()
    seconds = time.process_time() - started - forced.seconds
    return Measured(seconds, [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows])


def row_of(contest: Contest, theirs: Measured, ours: Measured, peak: float) -> str:
    flops = flops_of(contest, ours.responses)
    same = sum(one == other for one, other in zip(theirs.responses, ours.responses, strict=True))
    cells = [str(contest.samples), f"{theirs.seconds:.3f}", f"{ours.seconds:.3f}"]
    cells += [f"{theirs.seconds / ours.seconds:.2f}"]
    cells += [f"{flops / one.seconds / peak:.0%}" for one in (theirs, ours)]
    return f"| {' | '.join([*cells, f'{same} of {len(ours.responses)}'])} |"


def flops_of(contest: Contest, responses: list[list[int]]) -> float:
    """Of a forward pass over each prompt once, and over each response behind it."""
    config: Any = contest.model.config
    shape = Architecture(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
    )
    prompts = [len(prompt.ids) for prompt in contest.prompts for _ in range(contest.samples)]
    both = [prompt + len(ids) for prompt, ids in zip(prompts, responses, strict=True)]
    again = forward_flops(shape, prompts, 0) * (contest.samples - 1) // contest.samples
    return forward_flops(shape, both, sum(map(len, responses))) - again


if __name__ == "__main__":
    run(main)
