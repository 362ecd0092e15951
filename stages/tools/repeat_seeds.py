"""Train DPO, PPO and GRPO again with other seeds, on the same supervised and reward models; say how far they spread.

    python -m stages.tools.repeat_seeds --count 5

Each seed is an experiment of DVC, seeds-<seed>, run in a folder of its own: what lies in the project stays as it is.
Those that this commit already has are not run again, and `dvc exp apply seeds-18` fetches one. The intervals in
metrics/ cover prompts, not training; those printed here are Student's over the seeds. It needs a commit of all that is
changed, since an experiment belongs to one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.lib.command.errors import StageError
from stages.lib.command.params import PARAMS_FILE
from stages.lib.command.run import run
from stages.lib.evaluation.seed_means import seed_mean
from stages.lib.settings.sections import read_all_params

REPEATED = ("train_dpo", "train_ppo", "train_grpo")
# The columns of the table: a metric's name, and the stage that measures it.
COLUMNS = {
    "gold utility": ("evaluate", "gold_mean"),
    "minus reference": ("evaluate", "gold_minus_reference_mean"),
    "win rate": ("evaluate", "gold_win_rate_vs_reference"),
    "KL, nats": ("evaluate", "kl_to_reference_mean"),
    "reward": ("score_samples", "reward_mean"),
    "reward minus reference": ("score_samples", "reward_minus_reference_mean"),
    "gold less what the reward promises": ("score_samples", "gold_residual_mean"),
    "judge less what the reward promises": ("score_samples", "judge_residual_mean"),
}


def main(
    count: Annotated[int, typer.Option(help="Seeds: that of params.yaml and those that follow it.", min=1)] = 5,
) -> None:
    """Repeat the training of policies COUNT times, and print what each came to in the mean."""
    params = read_all_params()
    policies = repeated_policies(params)
    if not policies:
        raise StageError(f"{PARAMS_FILE}: evaluate.policies has no model of {', '.join(REPEATED)}; nothing to repeat")
    seeds = range(params["seed"], params["seed"] + count)
    if changed := printed_lines("git", "status", "--porcelain", "--untracked-files=no"):
        raise StageError(
            f"{changed[0].split()[-1]} has changed since the last commit; commit it, since seeds belong to one"
        )
    for number, seed in enumerate(seeds, start=1):
        print(f"seed {seed} ({number} of {count})", flush=True)
        if not commits_of(seed):
            run_experiment(seed, policies, params)
    print(seeds_table({name: [measured_in(seed, name) for seed in seeds] for name in policies}))


def repeated_policies(params: Mapping[str, Any]) -> dict[str, str]:
    """The evaluated policies that are trained with a seed: name in evaluate.policies → entry, as train_ppo.ppo."""
    made = {f"models/{name}": f"{section}.{name}" for section in REPEATED for name in params[section]}
    policies = params["evaluate"].policies.items()
    return {name: made[os.path.normpath(path)] for name, path in policies if os.path.normpath(path) in made}


def experiment(seed: int) -> str:
    return f"seeds-{seed}"


def run_experiment(seed: int, policies: Mapping[str, str], params: Mapping[str, Any]) -> None:
    """Raises StageError if a stage fails; what it has said is above."""
    changes = [word for entry in policies.values() for word in ("--set-param", f"{entry}.seed={seed}")]
    scored = params["score_samples"].policies
    targets = [f"evaluate@{name}" for name in policies]
    targets += [f"score_samples@{name}" for name in policies if name in scored]
    dvc = str(Path(sys.executable).parent / "dvc")
    command = [dvc, "exp", "run", "--temp", "--name", experiment(seed), *changes, *targets]
    ended = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "0"}, check=False)
    if ended.returncode:
        raise StageError(f"seed {seed}: dvc exp run ended with {ended.returncode}; the seeds before it are kept")


def printed_lines(*words: str) -> list[str]:
    """What a command prints. Raises StageError if it fails."""
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise StageError(f"{' '.join(words)} failed: {' '.join(ended.stderr.split())}")
    return ended.stdout.splitlines()


def commits_of(seed: int) -> list[str]:
    """The commit that DVC has made of a seed's experiment on this one, if it has."""
    (head,) = printed_lines("git", "rev-parse", "HEAD")
    ref = f"refs/exps/{head[:2]}/{head[2:]}/{experiment(seed)}"  # where DVC keeps them
    return printed_lines("git", "for-each-ref", "--format=%(objectname)", ref)


def measured_in(seed: int, policy: str) -> dict[str, float]:
    """What was measured on a policy in an experiment, as `<stage>/<metric>`; of both stages, or the first alone."""
    (commit,) = commits_of(seed)
    found = {}
    for path in printed_lines(
        "git", "ls-tree", "-r", "--name-only", commit, "metrics/evaluate", "metrics/score_samples"
    ):
        stage, name = Path(path).parts[1:]
        if name == f"{policy}.json":
            values = json.loads("\n".join(printed_lines("git", "show", f"{commit}:{path}")))
            found |= {f"{stage}/{metric}": value for metric, value in values.items()}
    return found


def seeds_table(measured: Mapping[str, list[dict[str, float]]]) -> str:
    """In Markdown: of each policy the mean of each metric over seeds."""
    there = {key for seeds in measured.values() for one in seeds for key in one}
    keys = {title: key for title, column in COLUMNS.items() if (key := "/".join(column)) in there}
    count = len(next(iter(measured.values())))
    lines = [f"| policy, {count} seeds | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    return "\n".join([*lines, *rows(measured, keys)])


def rows(measured: Mapping[str, list[dict[str, float]]], keys: Mapping[str, str]) -> Iterator[str]:
    for name, seeds in measured.items():
        cells = [str(seed_mean([one[key] for one in seeds])) if key in seeds[0] else "–" for key in keys.values()]
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    run(main)
