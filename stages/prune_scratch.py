"""Remove finished training state once `dvc.lock` holds its results (the make targets run this after DVC).

    python -m stages.prune_scratch

A stage that was killed, that runs, or whose result DVC has not recorded yet, is left alone.
"""

import shutil
from pathlib import Path

from stages.lib.errors import run


def main() -> None:
    """Remove the scratch folders whose outs stand in `dvc.lock` with the same hashes."""
    from ruamel.yaml import YAML

    from stages.lib.outputs import remove
    from stages.lib.scratch import taken_lock
    from stages.lib.scratch_root import scratch_root

    lock_file = Path("dvc.lock")
    lock = YAML(typ="safe", pure=True).load(lock_file.read_text()) if lock_file.is_file() else {}
    recorded = {
        (out["path"], out.get("md5"))
        for stage in (lock or {}).get("stages", {}).values()
        for out in stage.get("outs", [])
    }
    root = scratch_root()
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
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


def is_recorded(folder: Path, recorded: set[tuple[str, str]]) -> bool:
    """True if a run has finished there whose outs are all among the (path, hash) of `recorded`."""
    from stages.lib.scratch import completed_record

    record = completed_record(folder)
    return record is not None and {(out["path"], out["dvc_hash"]) for out in record["outs"].values()} <= recorded


def is_empty(folder: Path) -> bool:
    """True if nothing is there but the lock."""
    return folder.is_dir() and all(entry.name == "lock" for entry in folder.iterdir())


if __name__ == "__main__":
    run(main)
