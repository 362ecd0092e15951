"""What is left of `dvc.lock` if DVC is killed while it writes it, and what it is mended with."""

import re
from itertools import pairwise
from pathlib import Path

LOCK_FILE = Path("dvc.lock")
SCHEMA = b"schema: '2.0'\n"
HEAD = SCHEMA + b"stages:\n"
# The line that a stage's record, or another section, begins with.
BEGINNING = re.compile(rb"^(?: {2})?[^\s#-][^\n]*:$", re.MULTILINE)
CONFLICT = re.compile(rb"^(<{7}|={7}|>{7})( |$)", re.MULTILINE)  # of a merge in Git


def is_cut_off(content: bytes) -> bool:
    """Whether this is the beginning of what DVC was about to write; what is wrong otherwise is no end of a write."""
    if CONFLICT.search(content) or not (content.startswith(SCHEMA) or SCHEMA.startswith(content)):
        return False
    # DVC ends each line, and has no key without a value.
    return not content.endswith(b"\n") or content.endswith(b":\n")


def mended(content: bytes, committed: bytes) -> bytes:
    """What was cut off, with its whole records and, of the stages that have none there, those of `committed`.

    A record is no more than DVC's memory of a run: one that does not fit what is here makes the stage stale.
    """
    beginnings = [match.start() for match in BEGINNING.finditer(content)]
    kept = content[: beginnings[-1]] if beginnings else b""
    there = records(kept)
    old = {} if is_cut_off(committed) else records(committed)
    lost = b"".join(record for name, record in old.items() if name not in there)
    return (kept if there else HEAD) + lost if there or lost else b""


def records(content: bytes) -> dict[bytes, bytes]:
    """Stage → its record, as it stands in the file."""
    places = [match.start() for match in BEGINNING.finditer(content)]
    pieces = [content[start:end] for start, end in pairwise([*places, len(content)])]
    return {piece.splitlines()[0].strip(): piece for piece in pieces if piece.startswith(b"  ")}
