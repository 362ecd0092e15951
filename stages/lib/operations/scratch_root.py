"""Where a project keeps what is no result: training state, the log of runs, what trackers write."""

import os
from pathlib import Path

from stages.lib.operations.own_folders import require_folder_of_its_own


def scratch_root() -> Path:
    """`$STAGEWISE_SCRATCH`, or `.scratch` in the project. Raises StageError if results or Git keep theirs there."""
    root = Path(os.environ.get("STAGEWISE_SCRATCH") or ".scratch")
    require_folder_of_its_own(root, "environment variable STAGEWISE_SCRATCH")
    return in_project(root)


def in_project(path: Path) -> Path:
    """A path relative to the project, where it stays.

    `dvc exp run --temp` and `--queue` run in a temporary copy of the project, which is removed; DVC then names the
    project itself in `$DVC_ROOT`.
    """
    project = Path(os.environ.get("DVC_ROOT") or ".")
    return path if project.resolve() == Path.cwd() else project / path
