"""Make `dvc.lock` whole again if DVC was killed while it wrote it (the make targets that run stages do this first).

    python -m stages.tools.mend_lock

DVC writes the file in place, from its beginning, each time a stage has run. The records that are whole stay; those of
the other stages come from the last commit. What has run since then, DVC finds in its run cache.
"""

import subprocess
from pathlib import Path

from stages.lib.command.run import run

FIRST_STAGE = b"code_manifest:"  # whose record every dvc.lock holds since there are manifests


def main() -> None:
    """Mend a dvc.lock that was cut off. One with any other fault is left for DVC to complain of."""
    from stages.tools.dvc_lock import LOCK_FILE, is_cut_off

    lock = LOCK_FILE.resolve()
    if not lock.is_file():
        return
    content = lock.read_bytes()
    if not is_cut_off(content):
        tell_of_earlier_version(content)
        return
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo().lock:
            mend(lock)
    except DvcException:  # another DVC writes it at this moment, or this is no project: DVC itself will say so
        return


def tell_of_earlier_version(content: bytes) -> None:
    """Say in one line that all stages run again, if the file is of a version without manifests of code."""
    from stages.tools.dvc_lock import records

    names = records(content)
    if names and FIRST_STAGE not in names:
        print(
            "note: dvc.lock is of an earlier version of stagewise, whose token tables, names and checkpoints this one "
            "does not read: every stage runs again"
        )


def mend(lock: Path) -> None:
    """Replace the file, if it still is cut off."""
    from stages.lib.command.outputs import written_whole
    from stages.tools.dvc_lock import LOCK_FILE, is_cut_off, mended, records

    content = lock.read_bytes()
    if not is_cut_off(content):
        return
    whole = mended(content, committed_lock())
    if whole:
        with written_whole(lock) as (partial,):
            partial.write_bytes(whole)
    else:
        lock.unlink()
    print(
        f"{LOCK_FILE} was cut off: DVC was stopped in the middle of writing it. It has {len(records(whole))} records "
        "again, its own that were whole and, of other stages, those of the last commit. "
        "What has run since, DVC takes from its run cache."
    )


def committed_lock() -> bytes:
    """The file in the last commit; nothing where there is none, or no Git."""
    try:
        return subprocess.run(["git", "show", "HEAD:./dvc.lock"], capture_output=True, check=False).stdout
    except FileNotFoundError:
        return b""


if __name__ == "__main__":
    run(main)
