"""Does GRPO add to what SFT has learned on a task that leaves nothing to please, and do cheaper ways add as much?

The profile `arithmetic` through the real scripts, with GRPO on several seeds from the same SFT model, and beside it SFT
for one more epoch, for as long as GRPO, and on right answers among as many samples. A difference of two policies is
that of their greedy answers to each test prompt, with a 95 % interval by bootstrap over prompts.

    python -m tests.proofs.arithmetic_task FOLDER --table tests/proofs/arithmetic_task.md

It fails unless SFT is done learning, and GRPO adds on every seed what SFT had left to gain.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.data.chat import decode_completion, load_tokenizer
from stages.lib.data.prompts import Prompt, prompts_of
from stages.lib.data.token_tables import PROMPT_SCHEMA, read_table
from stages.lib.evaluation.intervals import paired_bootstrap_interval
from stages.lib.models.pretrained import end_and_pad_ids
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.episodes import Episode
from stages.lib.rl.samplers.own import OwnSampler
from stages.lib.tasks.arithmetic import grade
from stages.tools.use_profile import settings_of
from tests.pipeline.graph import all_instances, load_graph
from tests.proofs.measured_commit import measured_commit
from tests.stages.tiny_pipeline import PROJECT, script, stage_options, write_yaml

K, SAMPLED = 8, 100  # samples of pass@k, and to how many of the prompts
LATER = "train_sft@rejection"
EPOCH = {"model": "models/sft", "epochs": 1.0}
HEAD = """# GRPO on arithmetic, and what else might have helped

The profile `arithmetic` at commit {commit}; `make prove` makes this table again. Right answers to {prompts} test
prompts, greedy; "over SFT" is the mean difference on the same prompts, in points, with its 95 % interval; "worked" is
the share of greedy answers that write steps down. To {sampled} of the prompts {k} samples each were drawn at
temperature 1: the share of them that are right, that of prompts with a right one (pass@{k}), and that of right ones
among those that write steps down, so how well they are worked, however often. Harder: greedy, on {harder} problems of
three steps, of which there were none in training. Time is that of training and sampling after SFT.

| policy | greedy | over SFT | worked | samples | pass@{k} | right if worked | harder | minutes of CPU |
|---|---|---|---|---|---|---|---|---|
"""


class Measured(NamedTuple):
    """What a policy answers to test prompts."""

    greedy: list[float]  # grades, prompt by prompt
    worked: list[bool]  # which greedy answers write steps down
    sampled: list[list[float]]  # grades of K samples of each
    worked_samples: list[float]  # grades of those that write steps down
    harder: list[float]

    @property
    def pass_at_k(self) -> float:
        return mean([max(grades) for grades in self.sampled])


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def settings_with(seeds: Sequence[int]) -> dict[str, Any]:
    """The profile, with GRPO once for each seed, and one more epoch of SFT at the rate at which SFT ended."""
    settings = settings_of(PROJECT / "profiles/arithmetic.yaml")
    grpo, sft = settings["train_grpo"]["grpo"], settings["train_sft"]["sft"]
    settings["train_grpo"] = {f"grpo-{seed}": deepcopy(grpo) | {"seed": seed} for seed in seeds}  # YAML would alias
    rate = sft["optimizer"]["learning_rate"] * sft["optimizer"]["min_learning_rate_ratio"]
    more = sft["optimizer"] | {"learning_rate": rate, "schedule": "constant", "warmup_ratio": 0.0}
    settings["train_sft"]["epoch"] = deepcopy(sft) | EPOCH | {"optimizer": more}
    settings["evaluate"]["policies"] = {}
    return settings


def in_order(settings: dict[str, Any]) -> list[str]:
    """The stages up to the policies. The graph has them group by group, and SFT is trained on what it has sampled."""
    first, *stages = [stage for stage in all_instances(load_graph(), settings) if stage not in (LATER, "report")]
    assert first == "code_manifest", "it writes what each project has already"
    return [*stages, LATER]


def run(folder: Path, settings: dict[str, Any]) -> None:
    """All stages up to the policies; what an earlier start has finished stays."""
    if not folder.exists():
        folder.mkdir(parents=True)
        for name in ("stages", "dvc.yaml", "runtime.yaml"):
            (folder / name).symlink_to(PROJECT / name)
        shutil.copytree(PROJECT / "code_manifests", folder / "code_manifests")
    write_yaml(folder / "params.yaml", settings)
    for stage in in_order(settings):
        done = folder / "done" / stage
        if done.exists():
            continue
        words = [sys.executable, "-m", f"stages.{script(stage)}", *stage_options(stage)]
        own = {"PYTHONPATH": str(PROJECT), "STAGEWISE_SCRATCH": str(folder / ".scratch")}
        before = children_seconds()
        ended = subprocess.run(words, cwd=folder, env=os.environ | own, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(f"{stage} failed:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        done.parent.mkdir(exist_ok=True)
        done.write_text(f"{children_seconds() - before:.1f}")
        print(f"{stage}: {(ended.stdout.splitlines() or [''])[-1]}", flush=True)


def children_seconds() -> float:
    """Seconds of CPU of the processes that have been started and have ended."""
    times = os.times()
    return times.children_user + times.children_system


@cache
def test_prompts(folder: Path) -> dict[str, list[Prompt]]:
    """The test prompts of each source."""
    prompts = prompts_of(read_table(folder / "data/tokens/test/prompts.arrow", PROMPT_SCHEMA)[:])
    sources = dict.fromkeys(prompt.source for prompt in prompts)
    return {source: [prompt for prompt in prompts if prompt.source == source] for source in sources}


def measured(folder: Path, name: str) -> Measured:
    """One policy's answers to all test prompts; those to the harder ones greedy alone."""
    model = AutoModelForCausalLM.from_pretrained(folder / f"models/{name}").eval()
    decode = partial(decode_completion, load_tokenizer(folder / f"models/{name}"))
    alone, budget = Processes(0, 1, torch.device("cpu")), MemoryBudget("generation_batch_size", 256)

    def answers(prompts: list[Prompt], temperature: float, count: int) -> list[Episode]:
        ids = end_and_pad_ids(folder / f"models/{name}")
        own = (TokenLogProbs(model, chunk_tokens=4096), model, 17, temperature, 64, *ids, decode, budget, alone)
        return OwnSampler(*own, by_row=True).sample(prompts, 0, count)

    def grades(episodes: list[Episode]) -> list[float]:
        return [episode.ended * grade(episode.prompt, episode.text) for episode in episodes]

    usual, harder = test_prompts(folder).values()
    greedy, samples = answers(usual, 0.0, 1), answers(usual[:SAMPLED], 1.0, K)
    return Measured(
        greedy=grades(greedy),
        worked=[is_worked(episode) for episode in greedy],
        sampled=[grades(samples[start : start + K]) for start in range(0, len(samples), K)],
        worked_samples=grades([episode for episode in samples if is_worked(episode)]),
        harder=grades(answers(harder, 0.0, 1)),
    )


def is_worked(episode: Episode) -> bool:
    return "\n" in episode.text


def gain(own: Measured, sft: Measured) -> tuple[float, float, float]:
    """Mean difference of the greedy answers, and its 95 % interval."""
    differences = [ours - theirs for ours, theirs in zip(own.greedy, sft.greedy, strict=True)]
    return (mean(differences), *paired_bootstrap_interval(differences, seed=0))


def minutes(folder: Path, *stages: str) -> str:
    """Of CPU, that stages took."""
    return f"{sum(float((folder / 'done' / stage).read_text()) for stage in stages) / 60:.1f}" if stages else ""


def row_of(name: str, own: Measured, sft: Measured, time_taken: str) -> str:
    over = "" if own is sft else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in gain(own, sft)))
    shares = (mean(own.greedy), mean([mean(group) for group in own.sampled]), own.pass_at_k)
    greedy, samples, pass_at_k = (f"{share:.1%}" for share in shares)
    worked, if_worked = f"{mean(own.worked):.0%}", f"{mean(own.worked_samples):.1%}"
    cells = (name, greedy, over, worked, samples, pass_at_k, if_worked, f"{mean(own.harder):.1%}", time_taken)
    return f"| {' | '.join(cells)} |\n"


def is_shown(found: dict[str, Measured], policies: Sequence[str]) -> bool:
    """Whether SFT is done learning with much left to gain, and GRPO gains it on each seed."""
    sft = found["sft"]
    room = 0.3 <= mean(sft.greedy) <= 0.6 and sft.pass_at_k >= mean(sft.greedy) + 0.2
    gains = [gain(found[name], sft) for name in policies]
    return room and gain(found["epoch"], sft)[0] < 0.02 and all(one >= 0.15 and low > 0.08 for one, low, _ in gains)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    folder, policies = options.folder.resolve(), [f"grpo-{seed}" for seed in options.seeds]
    run(folder, settings_with(options.seeds))
    taken = {"sft": (), "epoch": (), "continued": ("train_sft@continued",)}
    taken |= {"rejection": ("sample_pairs@right", "train_sft@rejection")}
    taken |= {name: (f"train_grpo@{name}",) for name in policies}
    found = {name: measured(folder, name) for name in taken}
    first = found["sft"]
    text = HEAD.format(
        commit=measured_commit(), prompts=len(first.greedy), harder=len(first.harder), k=K, sampled=SAMPLED
    )
    text += "".join(row_of(name, found[name], first, minutes(folder, *stages)) for name, stages in taken.items())
    print(text)
    if options.table:
        options.table.write_text(text)
    sys.exit(0 if is_shown(found, policies) else 1)


if __name__ == "__main__":
    main()
