"""What came of a case: accepted, refused with one line, or one of the things that must not happen."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from tests.fuzz.case import Case
from tests.fuzz.child import Ended

Kind = Literal["accepted", "refused", "traceback", "hang", "lines", "exit", "left", "unexpected", "unprepared"]
FAULTS: dict[Kind, str] = {
    "traceback": "tracebacks",
    "hang": "hangs",
    "lines": "messages of several lines",
    "exit": "other exit codes",
    "left": "half-written outs",
    "unexpected": "against the rule",
    "unprepared": "not prepared",
}
LONGEST_LINE = 1100
ASIDE = ("warning:", "note:")
# What an earlier stage has read, and so should have refused; how many tokens a row has, tokenize alone can tell.
EARLIER = re.compile(
    r"data/(sources|prepared)\S*, (line|row) \d+(?!.*( budget is |chat template))|^(params|runtime)\.yaml: "
)
PWNED = "pwned"  # the file that every injected command would make


class Verdict(NamedTuple):
    kind: Kind
    detail: str  # the message, the last line of the traceback, …


def verdict(case: Case, folder: Path, runs: list[Ended], outs: Iterable[str], *, may_run_on: bool) -> Verdict:
    """Judge a case by its last run. `outs`: what that stage writes, which a refusal must not leave behind."""
    last = runs[-1]
    found = of_run(last, may_run_on=may_run_on)
    if found.kind not in ("accepted", "refused"):
        return found
    if (folder / PWNED).exists():
        return Verdict("unexpected", f"a command or code of the input was run; {found.detail}")
    left = left_behind(folder, outs if found.kind == "refused" else ())
    complaint = case.complaint(folder, found.kind == "accepted")
    if left or complaint:
        return Verdict("left" if left else "unexpected", f"{left or complaint}; {found.kind}: {found.detail}")
    if case.expected not in ("either", found.kind):
        return Verdict("unexpected", f"should be {case.expected}, but was {found.kind}: {found.detail}")
    if found.kind == "refused" and len(runs) > 1 and EARLIER.search(found.detail):
        return Verdict("unexpected", f"{runs[0].stage} accepted what {last.stage} refuses: {found.detail}")
    return found


def of_run(ended: Ended, *, may_run_on: bool) -> Verdict:
    both = f"{ended.stdout}\n{ended.stderr}"
    if "Traceback (most recent call last)" in both or "Traceback" in ended.stderr:
        return Verdict("traceback", f"{ended.stage}: {last_of_traceback(both)}")
    if ended.status is None:
        if may_run_on and ended.stdout.strip():
            return Verdict("accepted", f"still at work after {ended.seconds:.0f} s")
        return Verdict("hang", f"{ended.stage} did not end within {ended.seconds:.0f} s")
    if ended.status == 0:
        odd = [line for line in ended.stderr.splitlines() if not line.startswith(ASIDE)]
        return Verdict("accepted", f"stray words on stderr: {odd[0][:300]}" if odd else "")
    if ended.status != 2:
        return Verdict("exit", f"{ended.stage} ended with {ended.status}: {ended.stderr[-300:]!r}")
    return of_message(ended.stderr)


def of_message(stderr: str) -> Verdict:
    """Whether a refusal is one line that begins with `error:`, after warnings and notes at most."""
    lines = stderr.splitlines()  # counts exotic line breaks as well
    errors = [line for line in lines if line.startswith("error: ")]
    others = [line for line in lines if not line.startswith(("error: ", *ASIDE))]
    if len(errors) != 1 or others or not lines[-1].startswith("error: "):
        return Verdict("lines", f"{len(lines)} lines: {stderr[:400]!r}")
    if not errors[0].isprintable() or len(errors[0]) > LONGEST_LINE:
        return Verdict("lines", f"not one readable line: {errors[0][:400]!r}")
    return Verdict("refused", errors[0].removeprefix("error: "))


def left_behind(folder: Path, outs: Iterable[str]) -> str:
    """What a stage must not leave: partial outs ever, outs after a refusal."""
    there = [out for out in outs if (folder / out).exists()]
    partial = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.partial")
        if ".scratch" not in path.relative_to(folder).parts and not path.is_relative_to(folder / "stages")
    ]
    return f"left behind: {', '.join([*there, *partial])}" if there or partial else ""


def last_of_traceback(output: str) -> str:
    """Its last line, and the last place of ours that it went through."""
    lines = [line for line in output.splitlines() if line.strip()]
    places = re.findall(r'File "[^"]*/(stages/[^"]+)", line (\d+)', output)
    errors = [
        line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Invalid\w*)?\b: ?", line)
    ]
    errors = errors or lines[-1:]
    place = f" [{places[-1][0]}:{places[-1][1]}]" if places else ""
    return f"{errors[-1][:300]}{place}"
