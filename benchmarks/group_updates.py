"""Updates of GRPO with a group's prompt computed once, beside one copy of it for each response.

    python -m benchmarks.group_updates                                 random models, prompts of several lengths

The loss is that of the default run. Both ways start from the same weights and take the same steps on the same rollouts,
in turn, `--rounds` times; the best round of each counts, in seconds of the processor for an update. A prompt is
computed once where `runtime.yaml: pass_cost` says that it pays. "Prompt" and "response" are tokens, of a response in
the mean, a minibatch is of 64 rollouts, "rows" are those of all passes, and "distance" is the relative L2 distance of
the weights that both ways end with.

A group whose responses are in several minibatches is computed in each of them: the smaller a share of the rollouts a
minibatch is, the less there is to share.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from benchmarks.sampling import EOS, PAD, SEED, SHAPE, random_model
from stages.lib.command.params import build
from stages.lib.command.run import run
from stages.lib.compute.batching import MicroBatching, micro_batching
from stages.lib.compute.engine.choice import new_engine
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import Prompt
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.advantages import advantages_of
from stages.lib.rl.episodes import Episode
from stages.lib.rl.group_loss import step_loss
from stages.lib.rl.learner import Learner, minibatches
from stages.lib.rl.rollouts import Rollouts, read_rollouts
from stages.lib.settings.declaration import block
from stages.lib.settings.kl_penalty import first_kl_coef
from stages.lib.settings.runtime import Runtime, read_runtime
from stages.lib.settings.train_grpo import TrainGrpo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALONE = Processes(0, 1, torch.device("cpu"))
TEMPERATURE = 1.0


class Phase(NamedTuple):
    """What is learnt from: responses of random tokens, and how many of them a minibatch has."""

    samples: int  # of each prompt
    prompt_tokens: int
    response_tokens: int  # of the longest response; the mean is half
    rollouts: int
    minibatch: int


PHASES = tuple(
    Phase(samples, prompt, 48, 64, minibatch)
    for samples, minibatch in ((4, 32), (8, 32), (8, 64))
    for prompt in (24, 96, 256)
)


class Updated(NamedTuple):
    """What one way came to."""

    seconds: float  # of processors, an update
    rows: int  # of the model's passes, in an epoch
    weights: torch.Tensor


def main(
    rounds: Annotated[int, typer.Option(help="of which the best counts")] = 3,
    threads: Annotated[int, typer.Option(help="of both")] = 1,
) -> None:
    """Time the updates of a phase, with prompts shared and not."""
    torch.set_num_threads(threads)
    model = random_model(positions=512)
    print(f"{threads} threads, the best of {rounds} rounds\n")
    print("| samples a prompt | minibatch | prompt | response | apart, s | once, s | times | rows | distance |")
    print("|---|---|---|---|---|---|---|---|---|")
    for phase in PHASES:
        episodes = random_episodes(phase)
        found: dict[bool, list[Updated]] = {False: [], True: []}
        for _ in range(rounds):
            for share, results in found.items():
                results.append(updated(copy.deepcopy(model), episodes, phase, share=share))
        print(row_of(phase, *(min(results, key=lambda one: one.seconds) for results in found.values())), flush=True)


def random_episodes(phase: Phase) -> list[Episode]:
    """Groups one after the other, as a collector gives them."""
    chance = np.random.Generator(np.random.Philox(SEED))

    def tokens(length: int) -> list[int]:
        return chance.integers(PAD + 1, SHAPE.vocabulary, size=length).tolist()

    prompts = [Prompt(row, tokens(phase.prompt_tokens), [], {}) for row in range(phase.rollouts // phase.samples)]
    episodes = []
    for prompt in prompts:
        for sample in range(phase.samples):
            ids = [*tokens(int(chance.integers(phase.response_tokens))), EOS]
            episodes.append(Episode(prompt, ids, "", ended=True, sample=sample, engine_logps=None, policy_mask=[]))
    return episodes


def updated(model: PreTrainedModel, episodes: list[Episode], phase: Phase, *, share: bool) -> Updated:
    """The updates of a phase, its rewards random."""
    settings = grpo_settings(phase)
    runtime = build(Runtime, dict(read_runtime("train_grpo")) | {"share_prompts": share}, "the benchmark's runtime")
    batching = micro_batching(runtime, PAD, ALONE, model)
    engine = new_engine(TokenLogProbs(model, with_entropies=True), settings.optimizer, 100, runtime, ALONE)
    scores = np.random.Generator(np.random.Philox(SEED)).normal(size=len(episodes)).tolist()
    rollouts = read_rollouts(episodes, scores, engine, engine, None, TEMPERATURE, batching)
    advantages = advantages_of(rollouts, settings.advantages, {})
    batches = [*minibatches(len(episodes), settings, SEED, 0)]
    started = time.process_time()
    for rows in batches:
        loss = step_loss(settings, first_kl_coef(settings.kl), rollouts, advantages, rows)
        Learner("policy", engine, batching, rollouts, loss).update(rows)
    seconds = (time.process_time() - started) / len(batches)
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    return Updated(seconds, rows_of(batching, rollouts, batches), weights)


def grpo_settings(phase: Phase) -> TrainGrpo:
    """The default run's, with two epochs of the phase's minibatches."""
    sizes = {"samples_per_prompt": phase.samples, "rollout_batch_size": phase.rollouts // phase.samples}
    own: dict[str, Any] = block(TrainGrpo) | sizes | {"minibatch_size": phase.minibatch}
    return build(TrainGrpo, own, "the benchmark's train_grpo")


def rows_of(batching: MicroBatching, rollouts: Rollouts, batches: list[list[int]]) -> int:
    """Of the passes of all updates."""
    prompts, responses = rollouts.prompts, rollouts.responses
    given = (([prompts[row] for row in rows], [responses[row] for row in rows]) for rows in batches)
    return sum(len(batch.input_ids) for both in given for batch in batching.sequences(*both))


def row_of(phase: Phase, apart: Updated, once: Updated) -> str:
    distance = float((once.weights - apart.weights).norm() / apart.weights.norm())
    cells = [
        *(str(phase.samples), str(phase.minibatch), str(phase.prompt_tokens), str(phase.response_tokens // 2)),
        *(f"{apart.seconds:.3f}", f"{once.seconds:.3f}", f"{apart.seconds / once.seconds:.2f}"),
        *(f"{apart.rows} → {once.rows}", f"{distance:.0e}"),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run(main)
