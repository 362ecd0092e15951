"""Remove finished training state once `dvc.lock` holds its results (the make targets run this after DVC).

    python -m stages.tools.prune_scratch

A stage that was killed, that runs, or whose result DVC has not recorded yet, is left alone.
"""

import re
import shutil
from pathlib import Path

from stages.lib.command.run import run

SCRATCH_FOLDER = re.compile(r"\w+(@[\w-]+)?-[0-9a-f]{16}")  # stage and fingerprint; nothing else there is removed


def main() -> None:
    """Remove the scratch folders whose outs stand in `dvc.lock` with the same hashes."""
    from stages.lib.command.outputs import remove
    from stages.lib.operations.scratch_root import scratch_root
    from stages.lib.runs.scratch import taken_lock
    from stages.tools.dvc_lock import LOCK_FILE
    from stages.tools.lineage import Lock

    known = LOCK_FILE.is_file() and LOCK_FILE.stat().st_size > 0
    recorded = set(Lock().hash_of.items()) if known else set()
    root = scratch_root()
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.is_symlink() or not folder.is_dir() or not SCRATCH_FOLDER.fullmatch(folder.name):
            continue
        if not is_recorded(folder, recorded) and not is_empty(folder):
            continue
        lock = taken_lock(folder)
        if lock:
            # The record last: what a kill leaves of the folder goes the next time.
            for entry in folder.iterdir():
                if entry.name not in ("complete.json", "lock"):
                    remove(entry)
            shutil.rmtree(folder)
            lock.close()


def is_recorded(folder: Path, recorded: set[tuple[str, str | None]]) -> bool:
    """True if a run has finished there whose outs are all among the (path, hash) of `recorded`."""
    from stages.lib.runs.scratch import completed_record

    record = completed_record(folder)
    return record is not None and {(out["path"], out["dvc_hash"]) for out in record["outs"].values()} <= recorded


def is_empty(folder: Path) -> bool:
    """True if nothing is there but the lock."""
    return all(entry.name == "lock" for entry in folder.iterdir())


if __name__ == "__main__":
    run(main)
