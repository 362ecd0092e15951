"""`dvc.lock` as DVC writes it: the shape of its records, and what becomes of it if DVC is killed while it writes."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from stages.lib.errors import StageError

LOCK_FILE = Path("dvc.lock")
SCHEMA = b"schema: '2.0'\n"
HEAD = SCHEMA + b"stages:\n"
# The line that a stage's record, or another section, begins with.
BEGINNING = re.compile(rb"^(?: {2})?[^\s#-][^\n]*:$", re.MULTILINE)
CONFLICT = re.compile(rb"^(<{7}|={7}|>{7})( |$)", re.MULTILINE)  # of a merge in Git


class LockedPath(BaseModel):
    path: str
    md5: str | None = None  # what lies elsewhere may have another kind of hash


class LockedStage(BaseModel):
    """What DVC writes of a stage, as far as it is read here."""

    cmd: str | list[str]
    deps: list[LockedPath] = []
    outs: list[LockedPath] = []
    params: dict[str, dict[Any, Any]] = {}


def require_records(stages: Any) -> None:
    """Raise StageError naming the key if these are no records of stages as DVC writes them."""
    try:
        TypeAdapter(dict[str, LockedStage]).validate_python(stages)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in ("stages", *wrong["loc"]))
        raise StageError(f"{LOCK_FILE}: {key}: {wrong['msg']}; DVC writes it otherwise") from None


def is_cut_off(content: bytes) -> bool:
    """Whether this is the beginning of what DVC was about to write; what is wrong otherwise is no end of a write."""
    if CONFLICT.search(content) or not (content.startswith(SCHEMA) or SCHEMA.startswith(content)):
        return False
    if not content.endswith(b"\n") or content.endswith(b":\n"):  # DVC ends each line, and has no key without a value
        return True
    try:
        YAML(typ="safe", pure=True).load(content.decode())
    except MarkedYAMLError as error:
        return error.problem_mark.line >= content.count(b"\n")
    return False


def mended(content: bytes, committed: bytes) -> bytes:
    """What was cut off, with its whole records and, of the stages that have none there, those of `committed`.

    A record is no more than DVC's memory of a run: one that does not fit what is here makes the stage stale.
    """
    beginnings = [match.start() for match in BEGINNING.finditer(content)]
    kept = content[: beginnings[-1]] if beginnings else b""
    there = records(kept)
    lost = b"".join(record for name, record in records(committed).items() if name not in there)
    return (kept if there else HEAD) + lost if there or lost else b""


def records(content: bytes) -> dict[bytes, bytes]:
    """Stage → its record, as it stands in the file."""
    places = [match.start() for match in BEGINNING.finditer(content)]
    pieces = [content[start:end] for start, end in pairwise([*places, len(content)])]
    return {piece.splitlines()[0].strip(): piece for piece in pieces if piece.startswith(b"  ")}
