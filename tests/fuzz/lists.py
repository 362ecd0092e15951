"""The table of a run, and the lists that a person looks through."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.judge import FAULTS


class Result(NamedTuple):
    """What came of one case."""

    area: str
    number: int
    what: str
    kind: str
    detail: str
    summary: str
    seconds: float


INTRODUCTION = """\
# Wrong, odd and unusual inputs

Written by `make fuzz` with seed {seed}: what the stages made of inputs that were made wrong in one way each. Refused
means exit code 2, one line that begins with `error:`, and no outs. Against the rule is what had to be refused and was
accepted, or the other way round.
"""
COLUMNS = {"accepted": "accepted", "refused": "refused with one line", **FAULTS}


def table(results: Iterable[Result], seed: int) -> str:
    """A Markdown table with a row for each area."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.area, []).append(result)
    groups["all"] = [result for group in groups.values() for result in group]
    head = ["inputs", "cases", *COLUMNS.values(), "seconds a case"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *(row(name, group) for name, group in groups.items())]
    body = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return f"{INTRODUCTION.format(seed=seed)}\n{body}\n"


def row(name: str, results: Sequence[Result]) -> list[str | int]:
    counts = Counter(result.kind for result in results)
    seconds = sum(result.seconds for result in results) / max(len(results), 1)
    return [name, len(results), *(counts[kind] for kind in COLUMNS), f"{seconds:.2f}"]


def write_lists(results: Iterable[Result], folder: Path) -> None:
    """One Markdown list for what was accepted, refused and found, and all results as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    results = sorted(results, key=lambda result: (result.kind, result.area, result.number))
    groups = {
        "accepted.md": [result for result in results if result.kind == "accepted"],
        "refused.md": [result for result in results if result.kind == "refused"],
        "findings.md": [result for result in results if result.kind in FAULTS],
    }
    for name, group in groups.items():
        (folder / name).write_text("".join(map(entry, group)), encoding="utf-8", errors="backslashreplace")
    with (folder / "results.jsonl").open("w") as file:
        file.writelines(json.dumps(result._asdict()) + "\n" for result in results)


def entry(result: Result) -> str:
    kind = f"{result.kind}: " if result.kind in FAULTS else ""
    words = "; ".join(part for part in (result.detail, result.summary) if part)
    return f"- {result.area} {result.number}: {result.what}\n  - {kind}{words}\n"
