"""What ends a stage: a mistake of the user's, or a signal; and how a message is written on one line."""

LONGEST_MESSAGE = 1000  # characters; what a message quotes (a path, a value, a library's words) may be of any length


class StageError(Exception):
    """A mistake in a setting, a row or a file. The message says what, where, what was expected and what to do."""


class StoppedError(BaseException):
    """SIGTERM or Ctrl-C, raised where it arrived so that half-written outs are removed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def one_line(text: str) -> str:
    """`text` as one line of printable characters: a message may quote what a stranger's file holds.

    Line breaks, control characters and half surrogate pairs are escaped as in a Python string; a text longer than
    LONGEST_MESSAGE loses its middle.
    """
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
    if len(line) <= LONGEST_MESSAGE:
        return line
    half = LONGEST_MESSAGE // 2
    return f"{line[:half]} … {line[-half:]}"
