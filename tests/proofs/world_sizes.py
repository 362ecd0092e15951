"""The default pipeline on one process and on two: are the metrics as close as those of seeds, and the bytes the same?

Copies of the committed project run the training stages and the evaluations of DPO and PPO through DVC, all on the same
data and base model: with three seeds on one process; with the first seed on two processes, and on one process with
small micro-batches, to see what other rounding does without a second process; and up to the reward model on two
processes once more. A metric agrees if it lies no further from that of the first seed than the three seeds lie apart,
or than a rounding.
The second run on two processes must end with the bytes of the first.

    python -m tests.proofs.world_sizes FOLDER --table tests/proofs/world_sizes.md
"""

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from tests.pipeline.graph import computing_stages, trained_policies, training_stages
from tests.proofs.dvc_projects import copy_of_project, start_dvc
from tests.proofs.measured_commit import measured_commit
from tests.stages.tiny_pipeline import change, read_yaml

SHARED = ("prepare_base", "tokenize_data")  # and what they need: the data and the model that all runs start from
TRAINING = computing_stages()
EVALUATIONS = (
    *(f"{stage}@{policy}" for policy in trained_policies() for stage in ("evaluate", "score_samples")),
    "evaluate_rm@rm",
)
TWO_PROCESSES = "torchrun --standalone --nproc_per_node=2 -m"
SMALL_BATCHES = {"micro_batch_tokens": 1024}
ROUNDING = 1e-5  # relative, of a metric that is the same for all seeds
FILES = (
    *(f"training/{stage.partition('@')[2]}" for stage in training_stages()),
    *(stage.replace("@", "/") for stage in EVALUATIONS),
)
HEADLINES = [
    "training/sft: validation_loss",
    "training/rm: validation_loss",
    "evaluate_rm/rm: accuracy",
    "training/dpo: validation_loss",
    "training/dpo: validation_rewards_accuracies",
    "training/ppo: last_score_mean",
    "training/ppo: last_kl_mean",
    "evaluate/dpo: gold_minus_reference_mean",
    "score_samples/dpo: reward_minus_reference_mean",
    "evaluate/dpo: kl_to_reference_mean",
    "evaluate/ppo: gold_minus_reference_mean",
    "score_samples/ppo: reward_minus_reference_mean",
    "evaluate/ppo: kl_to_reference_mean",
    "training/grpo: last_score_mean",
    "training/grpo: last_kl_mean",
    "evaluate/grpo: gold_minus_reference_mean",
    "score_samples/grpo: reward_minus_reference_mean",
    "evaluate/grpo: kl_to_reference_mean",
]
HEAD = """# One process and two, beside three seeds

The default pipeline at commit {commit}; `make prove` makes this table anew. All runs start from the same data and base
model. "Spread" is the largest less the smallest of the three seeds' values, "apart" how far the run before it (with
the first seed) is from the first seed's: one on two processes, and one on one process with micro-batches of {tokens}
tokens, whose rounding differs too. All processes compute on one thread; on two, as is the default, other roundings give
other numbers. A run agrees if it is no further apart than the spread. Of the {count} metrics of training stages and
evaluations that differ between any of these runs, {agreeing}.

{table}
{disagreeing}
{bytes}
"""


def repro(folder: Path, *words: str, **environment: str) -> None:
    output = folder.with_suffix(".output")
    if start_dvc(folder, "repro", *words, output=output, **environment).wait():
        raise SystemExit(f"dvc repro {' '.join(words)} failed in {folder}:\n{output.read_text()[-3000:]}")


def run(
    folder: Path, name: str, seed: int, stages: tuple[str, ...], runtime: dict[str, int], **environment: str
) -> Path:
    """The stages with a seed, on the data and base model that `folder`/data was given. Returns the run's folder."""
    path = folder / name
    if (path / "done").exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder / "data", path, symlinks=True)
    lines = (path / "params.yaml").read_text().splitlines(keepends=True)
    lines = [f"seed: {seed}\n" if line.startswith("seed:") else line for line in lines]
    (path / "params.yaml").write_text("".join(lines))
    change(path / "runtime.yaml", {"default": runtime})
    for stage in stages:
        repro(path, "--single-item", "--force", stage, **environment)
        print(f"{name}: {stage}", flush=True)
    (path / "done").touch()
    return path


def run_alone(folder: Path, first: int) -> tuple[dict[int, Path], Path]:
    """Three seeds and the small micro-batches on one process each, two at a time with a thread each."""
    stages = TRAINING + EVALUATIONS
    with ThreadPoolExecutor(max_workers=2) as pool:
        seeds = {
            seed: pool.submit(run, folder, f"seed-{seed}", seed, stages, {"threads": 1})
            for seed in (first, first + 1, first + 2)
        }
        small = pool.submit(run, folder, "small-batches", first, stages, {"threads": 1, **SMALL_BATCHES})
        return {seed: future.result() for seed, future in seeds.items()}, small.result()


def metrics_of(folder: Path) -> pd.Series:
    """Every metric of the training stages and evaluations, by "file: key"."""
    return pd.Series(
        {
            f"{name}: {key}": float(value)
            for name in FILES
            for key, value in json.loads((folder / f"metrics/{name}.json").read_text()).items()
        }
    )


def hashes_of(folder: Path, stages: tuple[str, ...]) -> dict[str, str]:
    locked = read_yaml(folder / "dvc.lock")["stages"]
    return {out["path"]: out["md5"] for stage in stages for out in locked[stage]["outs"]}


def as_table(seeds: dict[int, pd.Series], others: dict[str, pd.Series]) -> pd.DataFrame:
    """A row a metric: the seeds' values and their spread; of each other run its value, how far apart, if it agrees."""
    table = pd.DataFrame({f"seed {seed}": values for seed, values in seeds.items()})
    one = table.iloc[:, 0]
    spread = table.max(axis=1) - table.min(axis=1)
    table["spread"] = spread
    differs = spread > 0
    for name, values in others.items():
        apart = (values - one).abs()
        agrees = apart <= np.maximum(spread, ROUNDING * one.abs())
        table = table.assign(**{name: values, f"apart ({name})": apart, f"agrees ({name})": agrees})
        differs |= apart > 0
    return table[differs]  # counts of rows and steps say nothing


def agreements(table: pd.DataFrame) -> pd.DataFrame:
    """A column for each run that is compared to the first seed's: which metrics agree."""
    columns = [name for name in table.columns if name.startswith("agrees")]
    return table[columns].rename(columns=lambda name: name[len("agrees (") : -1])


def in_markdown(table: pd.DataFrame) -> str:
    titles = [name.partition(" (")[0] for name in table.columns]
    lines = ["| metric | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, row in table.iterrows():
        cells = [("no", "yes")[value] if isinstance(value, bool) else f"{value:.4g}" for value in row]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def disagreements(table: pd.DataFrame) -> str:
    """The metrics that do not agree in every run, those of `HEADLINES` apart, as a table with a heading."""
    rest = table[~agreements(table).all(axis=1)].drop(HEADLINES, errors="ignore")
    return f"The others that do not all agree:\n\n{in_markdown(rest)}" if len(rest) else ""


def in_words(table: pd.DataFrame) -> str:
    counts = agreements(table).sum()
    return " and ".join(f"{count} agree of the run with {name}" for name, count in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if not (folder / "data").exists():
        folder.mkdir(parents=True, exist_ok=True)
        start = copy_of_project(folder / "start")
        repro(start, *SHARED)
        start.rename(folder / "data")
    first = read_yaml(folder / "data/params.yaml")["seed"]
    seeds, small = run_alone(folder, first)
    two = run(folder, "two", first, TRAINING + EVALUATIONS, {"threads": 2}, LAUNCH=TWO_PROCESSES)
    again = run(folder, "two-again", first, TRAINING[:2], {"threads": 2}, LAUNCH=TWO_PROCESSES)
    table = as_table(
        {seed: metrics_of(path) for seed, path in seeds.items()},
        {"two processes": metrics_of(two), "small micro-batches": metrics_of(small)},
    )
    hashes = [hashes_of(side, TRAINING[:2]) for side in (two, again)]
    same = hashes[0] == hashes[1]
    text = HEAD.format(
        commit=measured_commit(),
        tokens=f"{SMALL_BATCHES['micro_batch_tokens']:,}",
        count=len(table),
        agreeing=in_words(table),
        table=in_markdown(table.loc[HEADLINES]),
        disagreeing=disagreements(table),
        bytes=f"Run on two processes twice, in two folders, train_sft and train_rm wrote {len(hashes[0])} outs, "
        + ("each with the same hash both times." if same else "NOT all with the same hashes."),
    )
    print(text)
    if options.table:
        options.table.write_text(text)
    sys.exit(0 if same and agreements(table).loc[HEADLINES].all(axis=None) else 1)


if __name__ == "__main__":
    main()
