"""Why a row is not used: a rule leaves it out, or it says something that cannot be read."""

from stages.lib.command.errors import StageError


class UnusableRowError(Exception):
    """A row that a rule leaves out; its only argument is the reason under which it is counted."""


class MalformedRowError(StageError):
    """A row that says something which cannot be read. `reason` is what it is counted by where such rows are dropped."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
