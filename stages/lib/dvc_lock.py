"""`dvc.lock` as DVC writes it: whether it is whole, and what of it is if DVC was killed while it wrote."""

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.lib.errors import StageError

LOCK_FILE = Path("dvc.lock")
HEAD = b"schema: '2.0'\nstages:\n"
RECORD = re.compile(rb"^  \w[^\s:]*:$", re.MULTILINE)  # the line that a stage's record begins with

CONFLICT = re.compile(rb"^<{7} ", re.MULTILINE)  # of a merge in Git


class LockedPath(BaseModel):
    path: str
    md5: str


class LockedStage(BaseModel):
    """What DVC writes of a stage, as far as it is read here."""

    cmd: str
    deps: list[LockedPath] = []
    outs: list[LockedPath] = []
    params: dict[str, dict[str, Any]] = {}


def require_records(stages: Any, where: str) -> None:
    """Raise StageError naming the key if these are no records of stages as DVC writes them."""
    try:
        TypeAdapter(dict[str, LockedStage]).validate_python(stages)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in ("stages", *wrong["loc"]))
        raise StageError(
            f"{where}: {key}: {wrong['msg']}; DVC writes something else there: "
            f"`git checkout {where}` brings back the committed one"
        ) from None


def cut_back(content: bytes) -> bytes:
    """The records at the beginning that are whole, if `content` was cut off in the one at its end; else all of it."""
    if content.endswith(b"\n") and is_whole(content):
        return content
    starts = [match.start() for match in RECORD.finditer(content)]
    if CONFLICT.search(content):
        return content
    if len(starts) == 1 or (HEAD.startswith(content[: len(HEAD)]) and b"\n" not in content[len(HEAD) :]):
        return b""
    return content[: starts[-1]] if starts and is_whole(content[: starts[-1]]) else content


def is_whole(content: bytes) -> bool:
    try:
        document = YAML(typ="safe", pure=True).load(content.decode())
        require_records(document["stages"], str(LOCK_FILE))
    except (YAMLError, UnicodeDecodeError, StageError, KeyError, TypeError):
        return False
    return True
