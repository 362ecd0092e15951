"""What a fuzz case is: a project folder that is made wrong in one way, and the stages that meet it."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

Expected = Literal["either", "refused", "accepted"]


class Whole(dict[str, Any]):
    """Settings that replace a mapping of settings, where others are laid over it."""

    __slots__ = ()


Complaint = Callable[[Path, bool], str | None]  # of the folder, and whether the case was accepted


def no_complaint(_folder: Path, _accepted: bool) -> None:
    """Whatever the folder holds is well."""


class Case(NamedTuple):
    """One wrong, odd or merely unusual input.

    Attributes:
        what: in words, for the lists.
        prepare: makes a copy of the base project into what the stages meet.
        stages: run one after the other, until one does not accept.
        expected: what must come of it; "either" leaves that to whoever reads the lists.
        settings: laid over params.yaml before `prepare` runs.
        runtime: laid over the section `default` of runtime.yaml before `prepare` runs.
        unprivileged: permissions hold the stages back, even if the fuzz program runs as root.
        complaint: looks at the folder of a case that was accepted or refused, and says what is wrong there, or None.
    """

    what: str
    prepare: Callable[[Path], None]
    stages: tuple[str, ...]
    expected: Expected = "either"
    settings: Mapping[str, Any] = {}
    runtime: Mapping[str, Any] = {}
    unprivileged: bool = False
    complaint: Complaint = no_complaint


class Area(NamedTuple):
    """A kind of input.

    Attributes:
        needs: paths of the base project that its cases start from.
        named: cases written out one by one.
        mutated: draws one more case.
        systematic: cases that are listed by a rule, after `named`.
        share: of all cases of a long run.
        may_run_on: a stage that still computes at its time limit has accepted its settings.
    """

    needs: tuple[str, ...]
    named: tuple[Case, ...]
    mutated: Callable[[random.Random], Case]
    systematic: tuple[Case, ...] = ()
    share: float = 0.1
    may_run_on: bool = False

    def case(self, name: str, number: int, seed: int) -> Case:
        """The case of a number: those that are listed come first, and are the same whatever the seed."""
        listed = len(self.named)
        if number < listed:
            return self.named[number]
        if number < listed + len(self.systematic):
            return self.systematic[number - listed]
        return self.mutated(random.Random(f"{seed} {name} {number}"))


def put(path: Path, content: str | bytes) -> None:
    """Write a new file: what stands there may be a hard link to the base project's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def nothing(_: Path) -> None:
    """Prepares nothing: for cases whose settings are all that is wrong."""
