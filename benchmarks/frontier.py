"""Reward and gold utility against the KL to the reference: of policies through training, and of best-of-n.

    python -m benchmarks.frontier --prompts 200          after `make repro`, as `make frontier` does

Gao et al., Scaling laws for reward model over-optimization (arXiv 2210.10760). Three kinds of lines:

- best-of-n: of `--samples` replies of the reference to each prompt, without bias for each n; its KL is an upper bound.
- a policy, and the models on the way that `save_every` has left of it: sampled here, on the same prompts.
- PPO and GRPO by phase: the replies that they were trained on, graded afterwards; training has not seen the grades.

Held-out replies of the same reward (those of the test pairs) have the gold utility in the last column.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import typer

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import read_json
from stages.lib.command.run import run
from stages.lib.compute.batching import MicroBatching, micro_batching
from stages.lib.compute.processes import Processes, join_processes
from stages.lib.compute.sequence_logprobs import all_response_logps
from stages.lib.data.prompts import Prompt, prompts_of
from stages.lib.data.token_tables import PROMPT_SCHEMA, read_table
from stages.lib.evaluation.best_of_n import best_of_n, kl_bound
from stages.lib.models.pretrained import Loading, end_and_pad_ids
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.reward_model import RewardModel, load_reward_model
from stages.lib.rl.samplers.frozen_policy import frozen_sampler
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.sections import read_all_params
from stages.lib.tasks.table import grades

TOKENS = Path("data/tokens/test/prompts.arrow")
STEP = 2**31 - 3  # which neither training nor evaluate samples with
LARGEST_N = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Point(NamedTuple):
    name: str
    kl: str
    reward: float
    gold: float


class Judge(NamedTuple):
    """What replies are measured with."""

    settings: Any  # evaluate
    seed: int
    loading: Loading
    processes: Processes
    batching: MicroBatching
    reward: RewardModel

    def sample(self, model: Path, prompts: Sequence[Prompt], count: int) -> tuple[list[Episode], Any]:
        """Replies of a model, and the model: what gives log-probs."""
        sampler = frozen_sampler(model, self.settings, self.seed, self.loading, self.processes)
        return sampler.sample(prompts, STEP, count), sampler.policy

    def measured(self, episodes: Sequence[Episode]) -> tuple[np.ndarray, np.ndarray]:
        """Reward and gold utility of each reply."""
        prompts, texts = [episode.prompt for episode in episodes], [episode.text for episode in episodes]
        return np.array(self.reward(episodes)), np.array(grades(prompts, texts, str(TOKENS)), dtype=float)

    def logps(self, policy: Any, episodes: Sequence[Episode]) -> np.ndarray:
        prompts, replies = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]
        return all_response_logps(policy, prompts, replies, self.batching, self.settings.temperature or 1.0).numpy()


def main(
    prompts: Annotated[int, typer.Option(help="Test prompts.", min=1)] = 200,
    samples: Annotated[int, typer.Option(help="Of the reference, to each prompt, for best-of-n.", min=2)] = 64,
    table: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("benchmarks/frontier.md"),
) -> None:
    """Measure policies, training and best-of-n on PROMPTS, and write TABLE."""
    params = read_all_params()
    settings, scoring = params["evaluate"], params["score_samples"]
    if not scoring.policies:
        raise StageError("params.yaml: score_samples.policies is empty, so there is no reward to measure by")
    asked = prompts_of(read_table(TOKENS, PROMPT_SCHEMA)[:prompts])
    runtime, reference = read_runtime("evaluate"), Path(settings.reference)
    processes = join_processes(runtime)
    loading = Loading(settings.precision, runtime, processes.device, frozen=True)
    batching = micro_batching(runtime, end_and_pad_ids(reference)[1], processes)
    of_rewards = (Path(scoring.reward_model), scoring, loading, batching, processes, reference)
    reward = load_reward_model(*of_rewards, standardise=scoring.standardise_reward)
    judge = Judge(settings, settings.seed or params["seed"], loading, processes, batching, reward)
    points = [*of_best_of_n(judge, reference, asked, samples), *of_policies(judge, reference, asked)]
    points += of_training(params, judge)
    table.write_text(page(points, line_of(scoring.policies), len(asked), samples), encoding="utf-8")
    print(f"Wrote {table}")


def of_best_of_n(judge: Judge, reference: Path, prompts: Sequence[Prompt], samples: int) -> Iterator[Point]:
    episodes, _ = judge.sample(reference, prompts, samples)
    rewards, gold = (values.reshape(len(prompts), samples) for values in judge.measured(episodes))
    for n in (n for n in LARGEST_N if n <= samples):
        of_n = best_of_n(rewards, rewards, n), best_of_n(rewards, gold, n)
        yield Point(f"best of {n}", f"≤ {kl_bound(n):.2f}", *of_n)


def of_policies(judge: Judge, reference: Path, prompts: Sequence[Prompt]) -> Iterator[Point]:
    """Each policy as it is, behind the models that `save_every` has left on its way."""
    _, theirs = judge.sample(reference, prompts[:1], 1)
    for name, folder in judge.settings.policies.items():
        steps = sorted(Path(folder).glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
        for model in (*steps, Path(folder)):
            episodes, policy = judge.sample(model, prompts, 1)
            kl = float(np.mean(judge.logps(policy, episodes) - judge.logps(theirs, episodes)))
            means = (float(values.mean()) for values in judge.measured(episodes))
            yield Point(f"{name}, {model.name}" if model in steps else name, f"{kl:.2f}", *means)


def of_training(params: Any, judge: Judge) -> Iterator[Point]:
    """PPO and GRPO by phase, from the table of their rollouts; its text keeps special tokens, its ids are decoded."""
    for section in ("train_ppo", "train_grpo"):
        for name in params[section]:
            path = Path(f"data/rollouts/{name}/rollouts.parquet")
            rows = pq.read_table(path).to_pandas()
            sampler = frozen_sampler(Path(judge.settings.reference), judge.settings, 0, judge.loading, judge.processes)
            texts = [sampler.decode(ids.tolist()) for ids in rows["response_ids"]]
            facts = map(json.loads, rows["facts"])
            prompts = [Prompt(row, [], [], own) for row, own in zip(rows["row"], facts, strict=True)]
            rows["gold"] = np.array(grades(prompts, texts, str(path)), dtype=float)
            for phase, own in rows.groupby("iteration"):
                kl, score, gold = (float(own[column].mean()) for column in ("kl", "score", "gold"))
                yield Point(f"{name}, phase {phase}", f"{kl:.2f}", score, gold)


def line_of(policies: Sequence[str]) -> tuple[float, float] | None:
    """Slope and intercept of gold over reward on held-out replies, as score_samples has measured them."""
    found = read_json(Path(f"metrics/score_samples/{policies[0]}.json"))
    return (found["gold_line_slope"], found["gold_line_intercept"]) if "gold_line_slope" in found else None


def page(points: Sequence[Point], line: tuple[float, float] | None, prompts: int, samples: int) -> str:
    lines = [
        "# Reward and gold utility against KL",
        "",
        f"Written by `python -m benchmarks.frontier`, on {prompts} test prompts; best-of-n from {samples} replies of",
        "the reference to each, with an upper bound as its KL. Phases are means over the rollouts of training.",
        "",
        "| | KL to the reference, nats | reward | gold utility | of held-out replies of that reward |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        promised = "–" if line is None else f"{line[1] + line[0] * point.reward:.2f}"
        lines.append(f"| {point.name} | {point.kl} | {point.reward:.2f} | {point.gold:.2f} | {promised} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run(main)
