"""Places of outs and inputs that are not what a stage expects: files, folders, links, pipes, without permission."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.base import other_than_base, outs
from tests.fuzz.case import Area, Case, Complaint, Expected, put

STAGES = (
    "read_source_task@film_reviews",
    "prepare_data",
    "prepare_base@base",
    "tokenize_data@sft",
    "train_sft@sft",
    "ref_logprobs@sft",
    "train_ppo@ppo",
    "train_grpo@grpo",
    "evaluate@sft",
    "score_samples@sft",
    "report",
)
OUTSIDE = "outside"
KEPT = "kept.txt"


def clear(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def outside(path: Path) -> Path:
    """A folder with one file in it, beside the project's own, to which something links."""
    folder = next(parent for parent in path.parents if (parent / "params.yaml").exists()) / OUTSIDE
    put(folder / KEPT, "mine")
    return folder


def instead_of_parent(path: Path, make: Callable[[Path], object]) -> None:
    clear(path.parent)
    make(path.parent)


# What stands at the place of an out, how it comes there, what must come of it.
AT_OUT: tuple[tuple[str, Callable[[Path], object], Expected], ...] = (
    ("a file", lambda path: put(path, "x"), "either"),
    ("a folder with a file", lambda path: (path.mkdir(parents=True), put(path / "x", "x")), "either"),
    ("a dangling link", lambda path: path.symlink_to("nowhere"), "either"),
    ("a link to itself", lambda path: path.symlink_to(path.name), "either"),
    ("a link to a folder elsewhere", lambda path: path.symlink_to(outside(path)), "either"),
    ("a link to a file elsewhere", lambda path: path.symlink_to(outside(path) / KEPT), "either"),
    ("a FIFO", lambda path: os.mkfifo(path), "either"),
    ("a half-written folder", lambda path: (partial_of(path).mkdir(), put(partial_of(path) / "x", "x")), "accepted"),
    ("a half-written file", lambda path: put(partial_of(path), "x"), "accepted"),
    ("a half-written link elsewhere", lambda path: partial_of(path).symlink_to(outside(path)), "accepted"),
)
AT_PARENT: tuple[tuple[str, Callable[[Path], object], Expected], ...] = (
    ("a file", lambda path: put(path, "x"), "refused"),
    ("a dangling link", lambda path: path.symlink_to("nowhere"), "refused"),
    ("a link to itself", lambda path: path.symlink_to(path.name), "refused"),
)
WITHOUT_PERMISSION: tuple[tuple[str, int], ...] = (("read-only", 0o555), ("closed", 0o000))


def still_there(folder: Path) -> str | None:
    """What lies outside the project must not be touched."""
    kept = folder / OUTSIDE / KEPT
    if not (folder / OUTSIDE).exists():
        return None
    there = sorted(path.name for path in (folder / OUTSIDE).iterdir())
    whole = there == [KEPT] and kept.read_text() == "mine"
    return None if whole else f"what a link led to was changed: {there}"


def complaint_of(stage: str) -> Complaint:
    return lambda folder, accepted: still_there(folder) or (other_than_base(folder, stage) if accepted else None)


def at_out(stage: str, out: str, what: str, make: Callable[[Path], object], expected: Expected) -> Case:
    def prepare(folder: Path) -> None:
        clear(folder / out)
        make(folder / out)

    return Case(f"{stage}: {out} is {what}", prepare, (stage,), expected, complaint=complaint_of(stage))


def at_parent(stage: str, out: str, what: str, make: Callable[[Path], object], expected: Expected) -> Case:
    def prepare(folder: Path) -> None:
        instead_of_parent(folder / out, make)

    name = Path(out).parent.as_posix()
    return Case(f"{stage}: {name}, the folder of {Path(out).name}, is {what}", prepare, (stage,), expected)


def without_permission(stage: str, out: str, what: str, mode: int) -> Case:
    def prepare(folder: Path) -> None:
        (folder / out).parent.mkdir(parents=True, exist_ok=True)
        (folder / out).parent.chmod(mode)

    name = Path(out).parent.as_posix()
    return Case(
        f"{stage}: {name}, the folder of {Path(out).name}, is {what}", prepare, (stage,), "refused", unprivileged=True
    )


OUT_CASES = tuple(
    at_out(stage, out, what, make, expected)
    for stage in STAGES
    for out in outs(stage)
    for what, make, expected in AT_OUT
)
PARENT_CASES = tuple(
    at_parent(stage, out, what, make, expected)
    for stage in STAGES
    for out in outs(stage)
    if out.startswith(("metrics/", "data/tokens", "data/samples", "data/sample_scores", "data/rollouts"))
    for what, make, expected in AT_PARENT
    if stage != "report"
)
PERMISSION_CASES = tuple(
    without_permission(stage, out, what, mode)
    for stage in STAGES
    for out in (outs(stage)[0], outs(stage)[-1])
    for what, mode in WITHOUT_PERMISSION
)
# An input, and a stage that reads it.
INPUTS = (
    ("prepare_data", "data/sources/film_reviews/rows.jsonl"),
    ("prepare_base@base", "data/prepared/train/sft.jsonl"),
    ("tokenize_data@sft", "data/prepared/train/sft.jsonl"),
    ("tokenize_data@sft", "models/base/tokenizer.json"),
    ("tokenize_data@sft", "models/base/config.json"),
    ("train_sft@sft", "data/tokens/train/sft.arrow"),
    ("train_sft@sft", "models/base/model.safetensors"),
    ("train_sft@sft", "models/base/tokenizer_config.json"),
    ("train_dpo@dpo", "data/ref_logprobs/sft/train.arrow"),
    ("tokenize_data@prompts", "data/prepared/test/prompts.jsonl"),
    ("evaluate@sft", "data/tokens/test/prompts.arrow"),
    ("score_samples@sft", "data/samples/sft.jsonl"),
    ("evaluate_rm@rm", "data/prepared/test/preference.jsonl"),
    ("report", "metrics/training/sft.json"),
    ("report", "metrics/curves/sft.csv"),
    ("report", "data/samples/sft.jsonl"),
    ("report", "data/sample_scores/sft.jsonl"),
)
AT_INPUT: tuple[tuple[str, Callable[[Path], object], bool], ...] = (
    ("not there", lambda _: None, False),
    ("a folder", lambda path: path.mkdir(), False),
    ("a dangling link", lambda path: path.symlink_to("nowhere"), False),
    ("a link to itself", lambda path: path.symlink_to(path.name), False),
    ("a FIFO", lambda path: os.mkfifo(path), False),
    ("a device", lambda path: path.symlink_to("/dev/null"), False),
    ("not to be read", lambda path: (put(path, "x"), path.chmod(0)), True),
)


def at_input(stage: str, name: str, what: str, make: Callable[[Path], object], unprivileged: bool) -> Case:
    def prepare(folder: Path) -> None:
        clear(folder / name)
        make(folder / name)

    return Case(f"{stage}: its input {name} is {what}", prepare, (stage,), "refused", unprivileged=unprivileged)


INPUT_CASES = tuple(at_input(*given, *situation) for given in INPUTS for situation in AT_INPUT)
LISTED = (*INPUT_CASES, *PERMISSION_CASES, *PARENT_CASES, *OUT_CASES)


def mutated(draw: random.Random) -> Case:
    """Two situations at once."""
    stage = draw.choice(STAGES)
    (first, make, _), (second, also, _) = draw.choice(AT_OUT), draw.choice(AT_OUT)
    one, other = draw.choice(outs(stage)), draw.choice(outs(stage))
    cases = (at_out(stage, one, first, make, "either"), at_out(stage, other, second, also, "either"))

    def prepare(folder: Path) -> None:
        for case in cases[: 1 + (one != other)]:
            case.prepare(folder)

    return Case(f"{stage}: {one} is {first}, {other} is {second}", prepare, (stage,), complaint=complaint_of(stage))


AREA = Area(
    needs=("data", "models", "metrics"),
    named=LISTED,
    mutated=mutated,
    share=0.04,
)
