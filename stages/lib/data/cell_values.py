"""Lists and objects that stand in a cell as text: JSON, or what Python prints of them, as pandas writes to CSV."""

import ast
import io
import math
import tokenize
import warnings
from itertools import pairwise
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import parse_json
from stages.lib.data.row_errors import MalformedRowError

# Python's parser takes some hundred bytes a character; a conversation is far shorter.
LONGEST_LITERAL = 1_000_000
BETWEEN_TOKENS = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)
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
    return literal(text, told)


def literal(text: str, told: str) -> Any:
    """The value of a Python literal; `told` is what is wrong with it as JSON. Raises as `value_in_cell`."""
    if len(text) > LONGEST_LITERAL:
        raise MalformedRowError(
            f"{told}: {HINT}, which is read up to {LONGEST_LITERAL} characters; write JSON", "unreadable_cell"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # about backslashes that stand for nothing
            tree = ast.parse(text.strip(), mode="eval")
        refuse_joined_texts(text.strip())
        return plain_value(tree.body)
    except (ValueError, SyntaxError, MemoryError, RecursionError, SyntaxWarning, tokenize.TokenError) as error:
        reason = f" ({error})" if isinstance(error, UnclearLiteralError) else ""
        raise MalformedRowError(f"{told}: {HINT}{reason}", "unreadable_cell") from None


class UnclearLiteralError(ValueError):
    """A Python literal that Python reads as something else than was meant."""


def plain_value(node: ast.expr) -> Any:
    """The JSON value of a literal's syntax tree. Raises ValueError for what JSON does not have, such as a set."""
    match node:
        case ast.Constant(value=float() as number) if math.isinf(number):
            raise UnclearLiteralError("a number larger than any float64")
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return -plain_value(node.operand)
        case ast.List(elts=items):
            return [plain_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [plain_value(key) if key is not None else None for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise UnclearLiteralError("a dictionary whose keys are not all texts")
            if len(set(names)) < len(names):
                raise UnclearLiteralError("a key stands twice in one dictionary; which value counts?")
            return dict(zip(names, map(plain_value, values), strict=True))
    raise UnclearLiteralError(f"a Python {type(node).__name__.lower()} is no JSON value")


def refuse_joined_texts(text: str) -> None:
    """Raise a ValueError where two texts stand side by side: Python joins them."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = [token.type for token in tokens if token.type not in BETWEEN_TOKENS]
    if any(left == right == tokenize.STRING for left, right in pairwise(kinds)):
        raise UnclearLiteralError("two texts without a comma between them, as NumPy prints a list")
