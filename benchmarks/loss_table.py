"""Train a policy with every loss of train_dpo on the pipeline's pairs, and write down how good each has become.

    python -m benchmarks.loss_table                                    # needs data/tokens, models/base and models/sft
    python -m benchmarks.loss_table --only sigmoid --only 'rpo*'       # some of them; --list names them all
    python -m benchmarks.loss_table --seeds 18 --seeds 19 --best 3     # the three best of them again, with other seeds

Each loss has its own defaults; whatever else params.yaml says of its first entry of train_dpo (epochs, batch size,
learning rate, seed) all have alike, so no loss is given a learning rate of its own. The stages are run by their own
scripts in a folder of their own, reference log-probs included. A result stays there until settings or inputs change, so
that a run which was stopped goes on where it was.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hashes
from stages.lib.command.jsonl import write_json
from stages.lib.command.params import PARAMS_FILE
from stages.lib.command.run import run
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.settings import preference_loss as of
from stages.lib.settings.declaration import block
from stages.lib.settings.divergence import AlphaDivergence, ForwardKl, JensenShannon
from stages.lib.settings.ref_logprobs import RefLogprobs
from stages.lib.settings.runtime import RUNTIME_FILE
from stages.lib.settings.sections import build_all
from stages.tools.params_text import dumps_yaml

Loss = dict[str, Any]
PROJECT = Path(__file__).resolve().parents[1]
INPUTS = (Path("data/tokens"), Path("models/base"), Path("models/sft"))
SINGLE: dict[str, Loss] = {block(kind)["type"]: block(kind) for kind in get_args(get_args(of.PairLoss)[0])}


def part(weight: float, loss: Loss) -> dict[str, Any]:
    return block(of.WeightedLoss, weight=weight, loss=loss)


# A policy's folder has the name of its loss, and models/sft is what all start from.
LOSSES: dict[str, Loss] = {"sft-loss" if name == "sft" else name: loss for name, loss in SINGLE.items()} | {
    "cdpo": block(of.SigmoidLoss, label_smoothing=0.1),
    "ipo-summed": block(of.IpoLoss, over_tokens="sum"),
    "forward-kl": block(of.SigmoidLoss, divergence=block(ForwardKl)),
    "js": block(of.SigmoidLoss, divergence=block(JensenShannon)),
    "alpha": block(of.SigmoidLoss, divergence=block(AlphaDivergence)),
    "wpo": block(of.SigmoidLoss, wpo=True),
    "ld-dpo": block(of.SigmoidLoss, ld_alpha=0.5),
    "reference-free": block(of.SigmoidLoss, reference_free=True),
    "rpo": block(of.MixtureLoss),
    "mpo": block(
        of.MixtureLoss,
        parts={
            "preference": part(0.8, SINGLE["sigmoid"]),
            "quality": part(0.2, SINGLE["bco_pair"]),
            "likelihood": part(1.0, SINGLE["sft"]),
        },
    ),
}
HEAD = """# Preference losses on the same pairs

Written by `make losses`. {rows} pairs, {steps} steps of {batch_size} pairs. Each loss has its own defaults;
the learning rate, {learning_rate}, is the same for all. Gold: the utility that the task gives to replies to test
prompts, less that of SFT's replies, with its 95 % interval. Accuracy: of the implicit reward on test pairs. KL: to SFT,
in nats per reply. Chosen: how far the log-prob of a chosen validation reply has moved, in nats.

"""
COLUMNS = ("loss", "seed", "gold above SFT", "95 %", "accuracy", "KL", "chosen")


def entries(names: list[str], seeds: list[int | None]) -> Iterator[tuple[str, str, int | None]]:
    """(name of the entry, of the loss, seed) for each; None is the seed that params.yaml has."""
    for name in names:
        for seed in seeds:
            yield (name if seed is None else f"{name}-{seed}"), name, seed


def params_of(entry: str, name: str, seed: int | None, source: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that trains and evaluates one policy, from those of the pipeline."""
    loss = LOSSES[name]
    usual = next(iter(source["train_dpo"].values()), None)
    if usual is None:
        raise StageError("params.yaml: train_dpo has no entry, whose epochs and learning rate all losses would have")
    changed = {"model": "models/sft", "loss": loss, "reference": "data/ref_logprobs/sft", "save_every": None}
    changed |= {"tokens": "data/tokens", "validation_tokens": "data/tokens", "reference_sync": None}
    own = usual | changed | ({} if seed is None else {"seed": seed})
    reference = block(RefLogprobs, model="models/sft", per_token=True, precision=own["precision"])
    evaluate = source["evaluate"] | {"policies": {entry: f"models/{entry}"}, "reference": "models/sft"}
    params = source | {"train_dpo": {entry: own}, "ref_logprobs": {"sft": reference}, "evaluate": evaluate}
    if not build_all(params, PARAMS_FILE)["train_dpo"][entry].reads_reference:
        own["reference"] = own["model"]
    return params


def prepared(folder: Path) -> Path:
    """The folder in which the stages run, with links to what they read. Raises StageError for what is missing."""
    for path in INPUTS:
        if not path.exists():
            raise StageError(f"{path} is missing: run the pipeline up to the SFT model first (make train-sft)")
        link = folder / path
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(path.resolve())
    shutil.copy(RUNTIME_FILE, folder / RUNTIME_FILE)
    return folder


def stage(folder: Path, name: str, *options: str) -> None:
    """Run a stage by its script. Raises StageError with its last line if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "STAGEWISE_SCRATCH": str(folder.resolve() / "scratch")}
    command = [sys.executable, "-m", f"stages.{name}", *options]
    done = subprocess.run(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise StageError(f"{name} {' '.join(options)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")


def result_of(folder: Path, entry: str, params: dict[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """What training and evaluation of an entry found, from an earlier run if nothing has changed since."""
    kept = folder / "results" / f"{entry}.json"
    made_from = {"params": json.loads(json.dumps(params)), "inputs": dict(inputs)}
    if kept.exists() and (found := json.loads(kept.read_text()))["made_from"] == made_from:
        return found
    (folder / PARAMS_FILE).write_text(dumps_yaml(params))
    if params["train_dpo"][entry]["reference"] != params["train_dpo"][entry]["model"]:
        # The first time: once it has finished, it puts in place what it has.
        stage(folder, "ref_logprobs", "--out", "data/ref_logprobs", "--name", "sft")
    outs = ("--out", "models", "--metrics", "metrics/training", "--curve", "metrics/curves")
    stage(folder, "train_dpo", *outs, "--name", entry)
    outs = ("--tokens", "data/tokens/test", "--metrics", "metrics/evaluate", "--samples", "data/samples")
    stage(folder, "evaluate", *outs, "--name", entry)
    results = {"made_from": made_from}
    results |= {
        kind: json.loads((folder / f"metrics/{kind}/{entry}.json").read_text()) for kind in ("training", "evaluate")
    }
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, results)
    for path in (folder / "models" / entry, *(folder / "scratch").glob(f"*@{entry}-*")):
        shutil.rmtree(path)
    return results


def cells(name: str, found: dict[str, Any]) -> list[str]:
    """A row of the table; a dash where the prompts' task knows no gold utility."""
    training, test = found["training"], found["evaluate"]
    seed = next(iter(found["made_from"]["params"]["train_dpo"].values()))["seed"]
    gold, low, high = (test.get(f"gold_minus_reference_{end}") for end in ("mean", "ci_low", "ci_high"))
    return [
        name,
        str(found["made_from"]["params"]["seed"] if seed is None else seed),
        "–" if gold is None else f"{gold:+.2f}",
        "–" if low is None or high is None else f"{low:+.2f} to {high:+.2f}",
        f"{100 * test['preference_accuracy']:.1f} %",
        f"{test['kl_to_reference_mean']:.2f}",
        f"{training['validation_logps_chosen'] - training['validation_logps_chosen_before']:+.2f}",
    ]


def table_text(results: Mapping[str, tuple[str, dict[str, Any]]]) -> str:
    """The whole page. `results`: by entry, the name of its loss and what was found."""
    _, first = next(iter(results.values()))
    settings = next(iter(first["made_from"]["params"]["train_dpo"].values()))
    head = HEAD.format(
        rows=first["training"]["train_rows"],
        steps=first["training"]["steps"],
        batch_size=settings["batch_size"],
        learning_rate=settings["optimizer"]["learning_rate"],
    )
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(name, found) for name, found in results.values())]
    return head + told(results) + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def told(results: Mapping[str, tuple[str, dict[str, Any]]]) -> str:
    """Which entries do not beat SFT in gold, or that all do; nothing where no gold is known."""
    lows = {entry: found["evaluate"].get("gold_minus_reference_ci_low") for entry, (_, found) in results.items()}
    if None in lows.values():
        return ""
    others = [entry for entry, low in lows.items() if low <= 0]
    return f"Not above SFT with their interval: {', '.join(others)}.\n\n" if others else "All are above SFT.\n\n"


def best_of(results: Mapping[str, tuple[str, dict[str, Any]]], count: int) -> list[str]:
    """The losses whose gold is highest."""
    gold = {name: found["evaluate"].get("gold_minus_reference_mean", 0.0) for name, found in results.values()}
    return sorted(gold, key=lambda name: -gold[name])[:count]


def main(
    table: Annotated[Path, typer.Option(help="The page to write.")] = Path("benchmarks/loss_table.md"),
    folder: Annotated[Path, typer.Option(help="Where the stages run.")] = Path(".scratch/losses"),
    only: Annotated[list[str] | None, typer.Option(help="Losses, or patterns of their names.")] = None,
    best: Annotated[int, typer.Option(help="How many of the best are trained with each of --seeds.")] = 3,
    seeds: Annotated[list[int] | None, typer.Option(help="Further seeds for the best.")] = None,
    names: Annotated[bool, typer.Option("--list", help="Name the losses and end.")] = False,
) -> None:
    """Train and evaluate a policy with every loss, and write a table of them."""
    chosen = [name for name in LOSSES if not only or any(fnmatch.fnmatch(name, pattern) for pattern in only)]
    if names or not chosen:
        print("\n".join(LOSSES))
        return
    source = load_yaml(PARAMS_FILE)
    prepared(folder)
    inputs = dvc_hashes([*INPUTS])
    results: dict[str, tuple[str, dict[str, Any]]] = {}

    def measure(losses: list[str], with_seeds: list[int | None]) -> None:
        for entry, name, seed in entries(losses, with_seeds):
            found = result_of(folder, entry, params_of(entry, name, seed, source), inputs)
            results[entry] = name, found
            print(*cells(name, found), sep="  ", flush=True)
            table.write_text(table_text(results), encoding="utf-8")

    measure(chosen, [None])
    measure(best_of(results, best), [*(seeds or [])])


if __name__ == "__main__":
    run(main)
