"""Lists and objects that stand in a cell as text: JSON, or what Python prints of them, as pandas writes to CSV."""

import ast
import math
import re
import warnings
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import parse_json
from stages.lib.data.row_errors import MalformedRowError

# Python's parser takes some hundred bytes a character; a conversation is far shorter.
LONGEST_LITERAL = 500_000
# A text as Python prints it, in UTF-8: one pair of quotes. Two side by side are one constant of the syntax tree.
ONE_TEXT = re.compile(rb"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\"""")
HINT = "expected JSON, or what Python prints of lists and dictionaries"


def value_in_cell(text: str, where: str) -> Any:
    """The value of JSON text, or of a Python literal of lists, dictionaries, texts, numbers, True, False and None.

    Nothing is run: a literal is parsed and built.

    Raises:
        MalformedRowError: it is neither, or a literal that does not say one thing: a key that stands twice, texts that
            stand side by side without a comma (NumPy prints lists so, and Python would join them).
    """
    try:
        return parse_json(text, where)
    except StageError as error:
        told = str(error)
        if "not valid JSON" not in told or text.lstrip()[:1] not in ("[", "{"):
            raise MalformedRowError(f"{told}: {HINT}", "unreadable_cell") from None
    return literal(text.strip(), told)


def literal(text: str, told: str) -> Any:
    """The value of a Python literal; `told` is what is wrong with it as JSON. Raises as `value_in_cell`."""
    if len(text) > LONGEST_LITERAL:
        raise MalformedRowError(
            f"{told}: {HINT}, which is read up to {LONGEST_LITERAL} characters; write JSON", "unreadable_cell"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # about backslashes that stand for nothing
            tree = ast.parse(text, mode="eval")
        return plain_value(tree.body, text.encode().splitlines())
    except (ValueError, SyntaxError, MemoryError, RecursionError, SyntaxWarning) as error:
        reason = f" ({error})" if isinstance(error, UnclearLiteralError) else ""
        raise MalformedRowError(f"{told}: {HINT}{reason}", "unreadable_cell") from None


class UnclearLiteralError(ValueError):
    """A Python literal that Python reads as something else than was meant."""


def plain_value(node: ast.expr, lines: list[bytes]) -> Any:
    """The JSON value of a literal's syntax tree.

    Args:
        lines: the source, in UTF-8.
    Raises:
        UnclearLiteralError: JSON has no such value, such as a set; or it may not be what was meant.
    """
    match node:
        case ast.Constant(value=str() as text):
            source = lines[node.lineno - 1][node.col_offset : node.end_col_offset]
            if node.lineno != node.end_lineno or not ONE_TEXT.fullmatch(source):
                raise UnclearLiteralError("two texts without a comma between them, as NumPy prints a list")
            return text
        case ast.Constant(value=float() as number) if math.isinf(number):
            raise UnclearLiteralError("a number larger than any float64")
        case ast.Constant(value=None | bool() | int() | float()):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return -plain_value(node.operand, lines)
        case ast.List(elts=items):
            return [plain_value(item, lines) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [plain_value(key, lines) if key is not None else None for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise UnclearLiteralError("a dictionary whose keys are not all texts")
            if len(set(names)) < len(names):
                raise UnclearLiteralError("a key stands twice in one dictionary; which value counts?")
            return dict(zip(names, (plain_value(value, lines) for value in values), strict=True))
    raise UnclearLiteralError(f"a Python {type(node).__name__.lower()} is no JSON value")
