"""Telling that memory ran out, of the machine or of a GPU, from whatever a library raises for it (imports no torch)."""

import errno
import textwrap

WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")
LONGEST_REASON = 160  # characters; torch adds how its own memory is shared out


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory could not be had: torch's own types, those of CUDA's libraries, Python's."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # torch.OutOfMemoryError is a RuntimeError, and on a CPU torch raises a plain one.
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WORDS)


def reason_of(error: BaseException) -> str:
    """The beginning of what a library says of it, on one line."""
    return textwrap.shorten(str(error), LONGEST_REASON, placeholder=" …") or type(error).__name__


def out_of_memory_message(error: BaseException) -> str:
    """What to say of it where no setting of the pipeline is known to help."""
    return f"out of memory ({reason_of(error)}): end what else runs on this machine, or use one with more memory"
