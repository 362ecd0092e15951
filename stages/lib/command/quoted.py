"""How a message quotes what a user wrote: a value in few words, and the known name that is nearest."""

import difflib
from collections.abc import Iterable
from typing import Any

from stages.lib.command.strict_yaml import short

LONGEST_TEXT = 4096  # characters of a text in a setting, as of a path


def describe(value: Any) -> str:
    """A value and its type, in few words however large it is."""
    return "nothing" if value is None else f"{describe_number(value)} ({type(value).__name__})"


def describe_number(value: Any) -> str:
    try:
        return short(repr(value))
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"


def nearest(key: str, known: Iterable[Any]) -> str:
    """'; did you mean …?' with the known key that is closest to `key`, or nothing if none is close."""
    matches = difflib.get_close_matches(key[:LONGEST_TEXT], [str(name) for name in known], n=1, cutoff=0.5)
    return did_you_mean(matches[0]) if matches else ""


def did_you_mean(name: str) -> str:
    return f"; did you mean '{name}'?"
