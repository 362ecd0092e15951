"""Where a project keeps what is no result: training state and the log of runs."""

import os
from pathlib import Path


def scratch_root() -> Path:
    """`$STAGEWISE_SCRATCH`, or `.scratch/` in the project's top folder."""
    return Path(os.environ.get("STAGEWISE_SCRATCH") or ".scratch")
