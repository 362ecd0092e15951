"""`runs.jsonl` in the scratch folder: how each run of a stage went, one JSON object a line. No out, and not in Git.

How a stage is started is no part of its identity, so `dvc.lock` says nothing of it; a record holds the hashes of the
outs that the run wrote, and so belongs to whatever stage of `dvc.lock` has outs of these hashes.
"""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.lib.operations.code_closure import running_manifest
from stages.lib.operations.scratch_root import scratch_root

FILE_NAME = "runs.jsonl"
PLAIN_LAUNCHER = "python -m"
# Names under which these are imported as well as installed.
LIBRARIES = (
    *("torch", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "numpy", "pandas", "jinja2"),
    *("matplotlib", "deepspeed", "peft", "bitsandbytes"),
)
RunRecord = dict[str, Any]
_others: dict[str, str] = {}  # package → version: what a stage's worker processes have imported
# What is read of a record, and what it is.
FIELDS: dict[str, Any] = {
    "stage": str,
    "outs": dict,
    "ended": str,
    "seconds": int | float,
    "peak_memory_mib": int | float,
    "processes": int,
    "device": str,
    "launcher": str,
    "runtime": dict | None,
    "python": str,
    "versions": dict,
}


def note_versions(versions: Mapping[str, str]) -> None:
    """Have the record of this run name these packages, too, which other processes of it have imported."""
    _others.update(versions)


def log_run(
    stage: str,
    outs: Mapping[str, str],
    seconds: float,
    *,
    runtime: Mapping[str, Any] | None = None,
    processes: int = 1,
    device: str = "cpu",
    launcher: str = PLAIN_LAUNCHER,
) -> None:
    """Append the record of a run that is over. A log that cannot be written is a warning: the outs are whole.

    Args:
        outs: path of each out as on the command line → its hash as DVC records it.
        seconds: wall time of the work, without the imports; of a resumed run, since it was resumed.
        runtime: the stage's view of `runtime.yaml`, or None if it reads none.
    """
    record = {
        "stage": stage,
        "outs": dict(outs),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,  # of the main process
        "processes": processes,
        "device": device,
        "launcher": launcher,
        "runtime": runtime,
        "code": running_manifest(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("dvc", *LIBRARIES) if name == "dvc" or name in sys.modules}
        | _others,
    }
    try:
        scratch_root().mkdir(parents=True, exist_ok=True)
        with (scratch_root() / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        print(f"warning: {stage} is done, but its run could not be logged: {error}", file=sys.stderr, flush=True)


def launcher_in_use() -> str:
    """What a stage that starts through `stages/launch.sh` was started by."""
    started_by_hand = "not known: $LAUNCH is not set" if "RANK" in os.environ else PLAIN_LAUNCHER
    return os.environ.get("LAUNCH") or started_by_hand


def read_runs(folder: Path | None = None) -> list[RunRecord]:
    """The records, oldest first; lines that are no record, of a kill in the middle of one, are passed over.

    Args:
        folder: of training state; by default this project's.
    """
    path = (folder or scratch_root()) / FILE_NAME
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and all(isinstance(record.get(name, ...), kind) for name, kind in FIELDS.items()):
            records.append(record)
    return records


def run_that_made(outs: Mapping[str, str], records: list[RunRecord]) -> RunRecord | None:
    """The newest record whose outs have all of these hashes, or None."""
    made = [record for record in records if outs and outs.items() <= record["outs"].items()]
    return made[-1] if made else None
