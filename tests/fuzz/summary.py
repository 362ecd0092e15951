"""What an accepted case has come to, in a line, so that a person can see whether it is right."""

import json
import re
from pathlib import Path
from typing import Any

from stages.lib.command.hashing import dvc_hash
from tests.fuzz.base import outs

LONGEST = 1000
LONGEST_ROW = 320
# What is made of one of the raw rows in which nothing is wrong.
SOUND = re.compile(
    r"""^\{"kind": "\w+", "(?:messages|prompt)": \[\{"role": "user", "content": "What is \w+\?"\}"""
    r"""(?:\]|, \{"role": "assistant", "content": "It is good \w+\."\}\])"""
    r"""(?:, "chosen": \[\{"role": "assistant", "content": "It is good \w+\."\}\])?"""
    r"""(?:, "rejected": \[\{"role": "assistant", "content": "No \w+\."\}\])?\}$"""
)


def summary(folder: Path, stages: tuple[str, ...]) -> str:
    """The numbers that the stages have written, and rows of a source that are unlike the sound ones."""
    parts = [part for stage in stages for part in of_stage(folder, stage)]
    text = "; ".join(parts)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def of_stage(folder: Path, stage: str) -> list[str]:
    made = [folder / out for out in outs(stage)]
    parts = [f"{stage}: {numbers(path)}" for path in made if path.suffix == ".json" and path.is_file()]
    if stage.startswith("read_source"):
        return [*parts, *odd_rows(folder / outs(stage)[0])]
    return parts or [f"{stage}: {path.name} {dvc_hash(path)[:8]}" for path in made if path.exists()]


def numbers(path: Path) -> str:
    values: dict[str, Any] = json.loads(path.read_text())
    shown = {key: value for key, value in values.items() if value and "characters" not in key}
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in shown.items()
    )


def odd_rows(file: Path) -> list[str]:
    """Rows that are not those of sound raw rows."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    return [line[:LONGEST_ROW] for line in lines if not SOUND.search(line)][:2]
