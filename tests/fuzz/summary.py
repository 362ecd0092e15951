"""What an accepted case has come to, in a line, so that a person can see whether it is right."""

import json
import re
from pathlib import Path
from typing import Any

from stages.lib.command.hashing import dvc_hash
from tests.fuzz.base import outs

LONGEST = 800
LONGEST_ROW = 320
# A prepared row of one of the raw rows in which nothing is wrong.
SOUND = re.compile(
    r"""^\{"(messages|prompt)": \[\{"role": "user", "content": "What is (\w+)\?"\}(\], "chosen": \[|, )"""
    r"""\{"role": "assistant", "content": "It is good \2\."\}\]"""
    r"""(, "rejected": \[\{"role": "assistant", "content": "No \2\."\}\])?\}$"""
)


def summary(folder: Path, stages: tuple[str, ...]) -> str:
    """The numbers that the stages have written, and prepared rows that are unlike the sound ones."""
    parts = [part for stage in stages for part in of_stage(folder, stage)]
    text = "; ".join(parts)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def of_stage(folder: Path, stage: str) -> list[str]:
    if stage == "prepare_data":
        return [numbers(folder / "metrics/prepare_data.json"), *odd_rows(folder / "data/prepared")]
    metrics = [folder / out for out in outs(stage) if out.endswith(".json")] if "." not in stage else []
    if metrics:
        return [f"{stage}: {numbers(path)}" for path in metrics if path.is_file()]
    made = [folder / out for out in (outs(stage) if "." not in stage else ()) if (folder / out).exists()]
    return [f"{stage}: {path.name} {dvc_hash(path)[:8]}" for path in made]


def numbers(path: Path) -> str:
    values: dict[str, Any] = json.loads(path.read_text())
    shown = {key: value for key, value in values.items() if value}
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in shown.items()
    )


def odd_rows(prepared: Path) -> list[str]:
    """Prepared rows that are not those of sound raw rows."""
    for kind in ("preference", "sft"):
        lines = [line for split in ("train", "eval") for line in lines_of(prepared / kind / f"{split}.jsonl")]
        odd = [line for line in lines if not SOUND.search(line)]
        if lines:
            return [f"{kind} {line[:LONGEST_ROW]}" for line in odd[:2]]
    return []


def lines_of(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []
