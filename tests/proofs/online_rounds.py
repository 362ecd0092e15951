"""Does a second round of online DPO beat the first, in gold, on three seeds?

The profile `online-dpo` through the real scripts: for each seed data, base model, SFT and reward model, then two
rounds, each of replies sampled from the policy as it is then, to prompts of its own. All test prompts are answered, by
every policy with the same random numbers. The difference between two policies is that of their grades of each prompt,
with a 95 % interval by bootstrap over prompts.

    python -m tests.proofs.online_rounds FOLDER --table tests/proofs/online_rounds.md
    python -m tests.proofs.online_rounds FOLDER --seeds 17 --start PROJECT   # from the models of a run that is there
"""

import argparse
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from stages.lib.command.jsonl import read_jsonl
from stages.lib.evaluation.intervals import paired_bootstrap_interval
from stages.tools.use_profile import settings_of
from tests.pipeline.graph import all_instances, load_graph
from tests.proofs.measured_commit import measured_commit
from tests.proofs.stages_once import run_once
from tests.stages.tiny_pipeline import PROJECT, write_yaml

PROFILE = "online-dpo"
POLICIES = ("sft", "online1", "online2")
# What a run that is there brings, for all seeds alike.
GIVEN = ("data/tokens", "data/prepared", "models/base", "models/sft", "models/rm")
ROUNDS = (
    *("sample_pairs@first", "ref_logprobs@sft", "train_dpo@online1"),
    *("sample_pairs@second", "ref_logprobs@online1", "train_dpo@online2"),
    *(f"evaluate@{policy}" for policy in POLICIES),
)
HEAD = """# Two rounds of online DPO

The profile `{profile}` at commit {commit}; `make prove` makes this table again. Gold is the mean grade of the replies
to {prompts:,} test prompts; what a round adds is the mean difference of the grades of each prompt, with its 95 %
interval. "Best", "any" and "worst" are mean rewards, by the reward model, of the replies that a round has sampled.

| seed | SFT's gold | round 1 adds | round 2 adds | KL to SFT after 1, after 2 | sampled in 1: best, any, worst | in 2 |
|---|---|---|---|---|---|---|
"""


class Difference(NamedTuple):
    """Of the grades of two policies' replies."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def run(folder: Path, seed: int, given: Path | None) -> Path:
    """All stages of the profile with a seed but those of `given`; what an earlier start has finished stays."""
    project = folder / f"seed-{seed}"
    settings = settings_of(PROJECT / f"profiles/{PROFILE}.yaml") | {"seed": seed}
    settings["evaluate"]["max_prompts"] = None
    if not project.exists():
        project.mkdir(parents=True)
        for name in ("stages", "dvc.yaml", "runtime.yaml"):
            (project / name).symlink_to(PROJECT / name)
        shutil.copytree(PROJECT / "code_manifests", project / "code_manifests")
        for name in GIVEN if given else ():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).symlink_to((given / name).resolve())
    write_yaml(project / "params.yaml", settings)
    stages = [*all_instances(load_graph(), settings)]
    before = [] if given else stages[1 : stages.index(ROUNDS[0])]  # the first writes manifests
    run_once(project, (*before, *ROUNDS))
    return project


def grades_of(project: Path, policy: str) -> list[float]:
    return [row["gold"] for row in read_jsonl(project / f"data/samples/{policy}.jsonl")]


def added(project: Path, policy: str, before: str) -> Difference:
    """How much higher a policy's replies are graded than those of another to the same prompts."""
    both = zip(grades_of(project, policy), grades_of(project, before), strict=True)
    differences = [own - other for own, other in both]
    low, high = paired_bootstrap_interval(differences, seed=0)
    return Difference(sum(differences) / len(differences), low, high)


def metrics(project: Path, name: str) -> dict[str, float]:
    return json.loads((project / f"metrics/{name}.json").read_text())


def row_of(project: Path, seed: int) -> str:
    evaluated = {policy: metrics(project, f"evaluate/{policy}") for policy in POLICIES}
    steps = [added(project, policy, before) for before, policy in pairwise(POLICIES)]
    kls = [f"{evaluated[policy]['kl_to_reference_mean']:.2f}" for policy in POLICIES[1:]]
    sampled = [
        ", ".join(f"{found[f'reward_{which}mean']:.2f}" for which in ("best_", "", "worst_"))
        for found in (metrics(project, f"sample_pairs/{name}") for name in ("first", "second"))
    ]
    cells = [str(seed), f"{evaluated['sft']['gold_mean']:.2f}", *map(str, steps), ", ".join(kls), *sampled]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--start", type=Path, help="project whose data, SFT and reward model all seeds start from")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    projects = {seed: run(options.folder.resolve(), seed, options.start) for seed in options.seeds}
    first = next(iter(projects.values()))
    text = HEAD.format(profile=PROFILE, commit=measured_commit(), prompts=len(grades_of(first, "sft")))
    text += "".join(row_of(project, seed) for seed, project in projects.items())
    print(text)
    if options.table:
        options.table.write_text(text)
    sys.exit(0 if all(added(project, *POLICIES[:0:-1]).low > 0 for project in projects.values()) else 1)


if __name__ == "__main__":
    main()
