"""What to say where the operating system does not let a stage read, write or replace a file, or no space is left."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stages.lib.command.errors import StageError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def file_message(error: OSError) -> str:
    """What to say of a file or folder that the operating system does not let a stage read, write or replace."""
    if isinstance(error, shutil.Error) and error.args[0]:  # of a folder's copy: (from, to, reason) of each file
        _, path, reason = error.args[0][0]
        return f"{path}: {reason}"
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{names}: {error.strerror}; check that it exists, what it is (a file, a folder, a link) and its permissions"


def _no_space_message(error: Exception) -> str | None:
    """What to say of a write that did not fit; None if `error` means something else."""
    path, reason = "", str(error)
    if isinstance(error, shutil.Error) and error.args[0]:  # of a folder's copy: (from, to, reason) of each file
        _, path, reason = error.args[0][0]
    elif isinstance(error, OSError):
        path, reason = error.filename, error.strerror or str(error)
    # Copies and the library of safetensors say it in words only.
    if getattr(error, "errno", None) not in NO_SPACE and not any(os.strerror(number) in reason for number in NO_SPACE):
        return None
    where = f" at {path}" if path else f" in {Path.cwd()} or in the folder of training state"
    return f"no space left{where} ({reason}); free some and start again: what was saved before stands"


@contextlib.contextmanager
def no_space_explained() -> Iterator[None]:
    """Raise a StageError instead of whatever says that a disk is full."""
    try:
        yield
    except StageError:
        raise
    except Exception as error:  # libraries have types of their own for it; what means anything else goes on as it is
        message = _no_space_message(error)
        if message is None:
            raise
        raise StageError(message) from None
