"""Where a project keeps what is no result: training state and the log of runs."""

import os
from pathlib import Path


def scratch_root() -> Path:
    """`$STAGEWISE_SCRATCH`, or `.scratch` in the project.

    `dvc exp run --temp` and `--queue` run in a temporary copy of the project, which is removed; DVC then names the
    project itself in `$DVC_ROOT`.
    """
    if os.environ.get("STAGEWISE_SCRATCH"):
        return Path(os.environ["STAGEWISE_SCRATCH"])
    project = Path(os.environ.get("DVC_ROOT") or ".")
    return Path(".scratch") if project.resolve() == Path.cwd() else project / ".scratch"
