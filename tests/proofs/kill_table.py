"""What the kills came to: a row for each stage, number of processes and method, and the table of them in Markdown."""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.proofs.measured_commit import measured_commit


@dataclass
class Row:
    """One line of the table."""

    stage: str
    processes: int
    method: str
    trials: int = 0
    kills: int = 0
    resumed: int = 0
    slowest_exit: float = 0.0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        slowest = f"{self.slowest_exit:.1f}" if self.slowest_exit else "–"
        numbers = [self.trials, self.kills, self.resumed, len(self.failures), slowest, f"{self.seconds:.0f}"]
        return [self.stage, str(self.processes), self.method, *map(str, numbers)]


HEADINGS = ("stage", "processes", "method", "trials", "kills", "resumed", "failures", "slowest exit, s", "seconds")


def added_up(rows: list[Row]) -> list[Row]:
    """Rows of several rounds as one for each stage, number of processes and method."""
    sums: dict[tuple, Row] = {}
    for row in rows:
        total = sums.setdefault((row.stage, row.processes, row.method), Row(row.stage, row.processes, row.method))
        for name in ("trials", "kills", "resumed", "seconds", "failures"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
        total.slowest_exit = max(total.slowest_exit, row.slowest_exit)
    return list(sums.values())


def report(rows: list[Row], failures: list[str], table: Path | None, seeds: range) -> None:
    lines = [" | ".join(HEADINGS), " | ".join(["---"] * len(HEADINGS)), *(" | ".join(row.cells()) for row in rows)]
    text = "".join(f"| {line} |\n" for line in lines)
    kills = sum(row.kills for row in rows)
    summary = f"{kills} kills in {sum(row.trials for row in rows)} trials, {len(failures)} failures."
    print(f"\n{text}\n{summary}")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if table:
        used = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
        by = shlex.join(["python", "-m", "tests.proofs.kill_matrix", *sys.argv[1:]])
        head = f"# Killed and resumed\n\nWritten by `{by}`, {used}, from commit {measured_commit()}.\n"
        explained = (
            "\nA trial is a run of one stage of the tiny pipeline that is killed once or several times and then let\n"
            "finish. A failure is any file of the project that differs from an undisturbed run's, is missing or too\n"
            "much, training state that is left once DVC has recorded the result, or an end after SIGTERM or SIGINT\n"
            "that is slow or not told in one line. `resumed`: starts that went on from saved state.\n\n"
        )
        table.write_text(f"{head}{explained}{text}\n{summary}\n")
