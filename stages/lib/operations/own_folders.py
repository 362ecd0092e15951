"""Folders that a user names for what is no result, such as training state: where they must not lie."""

import os
from pathlib import Path

from stages.lib.command.errors import StageError

# What Git or DVC tracks, or what they and the environment keep there.
TAKEN = (
    "benchmarks",
    "data",
    "metrics",
    "models",
    "profiles",
    "schemas",
    "stages",
    "tests",
    ".ci",
    ".dvc",
    ".git",
    ".venv",
)

LONGEST_NAME = 255  # bytes, of the file systems in use


def project_folder() -> Path:
    """The project, also for an experiment that DVC runs in a copy of it."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def require_folder_of_its_own(path: Path, key: str, also_taken: tuple[str, ...] = ()) -> None:
    """Raise StageError, beginning with `key`, if `path` is the project, or lies in a folder that is taken.

    It counts where a path leads by its name as well as through links.
    """
    require_usable_names(path, key)
    for project in {project_folder(), Path.cwd().resolve()}:
        by_name = Path(os.path.normpath(project / path))
        for folder in (by_name, real(by_name)):
            if folder == project:
                raise StageError(f"{key} must be a folder of its own, and '{path}' is the project")
            for name in (*TAKEN, *also_taken):
                if any(folder.is_relative_to(taken) for taken in (project / name, real(project / name))):
                    raise StageError(f"{key} must not lie in {name}/, which is no place for it: found '{path}'")


def require_usable_names(path: Path, key: str) -> None:
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise StageError(f"{key} holds a name of more than {LONGEST_NAME} bytes, which no folder can have")


def real(path: Path) -> Path:
    """Where a path leads through links, also where one leads nowhere or to itself."""
    return Path(os.path.realpath(path))


def require_within_project(path: Path, key: str) -> None:
    """Raise StageError, beginning with `key`, if `path` leads out of the project by its name, or is a file."""
    require_usable_names(path, key)
    project = project_folder()
    if not Path(os.path.normpath(project / path)).is_relative_to(project):
        raise StageError(
            f"{key} must lie in the project, and '{path}' does not; to keep it elsewhere, make a link in the project "
            "that leads there"
        )
    if os.path.lexists(project / path) and not os.path.isdir(project / path):  # noqa: PTH112
        raise StageError(f"{key} must be a folder, and '{path}' is not one")
