"""What pydantic refuses, as one line: the key, what was expected, what was found, and the nearest known key."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from stages.lib.command.json_schema import KIND, NOTHING, Declared, item
from stages.lib.command.quoted import LONGEST_TEXT, describe, describe_number, did_you_mean, nearest
from stages.lib.command.strict_yaml import short

KeyPath = tuple[str | int, ...]
EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_pattern_mismatch": "a name of letters, digits, - and _",
    "string_too_short": f"a text of 1 to {LONGEST_TEXT} characters",
    "string_too_long": f"a text of 1 to {LONGEST_TEXT} characters",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section with keys",
    "union_tag_invalid": "a number, text, true, false, keys or a list",
}
NAME = r"^[A-Za-z0-9_][A-Za-z0-9_-]*$"
TEMPLATE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]*\.jinja$"
FUNCTION_PATH = r"^rewards/(?:[A-Za-z_]\w*/)*[A-Za-z_]\w*\.py:[A-Za-z_]\w*$"
REWARD_FILE = r"^rewards/(?:[\w-][\w.-]*/)*[\w-][\w.-]*$"
OF_PATTERNS = {
    REWARD_FILE: "the path of a file below rewards/, such as rewards/words.txt",
    FUNCTION_PATH: "a file and a function in it, such as rewards/example.py:score",
    NAME: "a name of letters, digits, _ and -",
    TEMPLATE_NAME: "the name of a file, of letters, digits, _, - and ., that ends in .jinja",
}
OF_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def refusal(error: ValidationError, kind: Any, values: Any, where: str) -> str:
    """What is wrong with `values`, which are no `kind`; `where` is the file, and the section they stand in.

    Unknown keys come before missing ones, which may be meant by them, and both before wrong values.
    """
    order = {"extra_forbidden": 0, "missing": 1}
    fault = min(error.errors(include_url=False), key=lambda one: order.get(one["type"], 2))
    place = place_of(fault, values)
    schema = Declared.top(TypeAdapter(kind).json_schema())
    if fault["type"] == "extra_forbidden":
        return f"{shown_place(where, place)} is not a known key{nearest_key(schema, place, values)}"
    if fault["type"] == "missing":
        default = schema.at(place, values).default
        told = "" if default is NOTHING else f"; its default is {json.dumps(default, ensure_ascii=False)}"
        return f"{shown_place(where, place)} is missing{told}"
    if fault["loc"][-1:] == ("[key]",):
        where, place = f"a key of {shown_place(where, place)}", ()
    return wrong_value(fault, schema.at(place, values), shown_place(where, place))


def place_of(fault: ErrorDetails, values: Any) -> KeyPath:
    """The keys and indices down to a fault, without the names of the types that pydantic tried on the way."""
    place: list[str | int] = []
    for part in fault["loc"][: -2 if fault["loc"][-1:] == ("[key]",) else None]:
        if part in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(part, int):
            place.append(part)
            values = item(values, part)
    return (*place, fault["loc"][-1]) if fault["type"] == "missing" else tuple(place)


def shown_place(where: str, place: KeyPath) -> str:
    return where + "".join(f"[{part}]" if isinstance(part, int) else f".{short(part)}" for part in place)


def wrong_value(fault: ErrorDetails, declared: Declared, where: str) -> str:
    """The message of a value that is of a wrong type, out of bounds, or none of those to choose from."""
    kind, value = fault["type"], fault["input"]
    if kind == "value_error":  # of a check of ours, which has said it all
        return f"{where}: {fault['ctx']['error']}"
    if kind in OF_BOUNDS:
        return f"{where} must be {declared.bounds(value)}, found {describe_number(value)}"
    if declared.choices:
        return one_of(value, declared.choices, where)
    if kind == "model_attributes_type":
        return f"{where}: expected a block with a {KIND}, one of: {', '.join(declared.types)}; found {describe(value)}"
    if kind == "union_tag_not_found":
        return f"{where}.{KIND} is missing; it is one of: {', '.join(declared.types)}"
    if kind == "union_tag_invalid" and declared.types:
        return one_of(value[KIND], list(declared.types), f"{where}.{KIND}")
    if kind == "string_pattern_mismatch":
        return f"{where}: expected {OF_PATTERNS[fault['ctx']['pattern']]}, found {describe(value)}"
    if kind == "string_unicode":
        return f"{where}: the text {describe(value)} holds a character that no file can"
    if kind == "float_type" and type(value) is int:
        return f"{where}: expected a number that a float can hold, found {describe(value)}"
    return f"{where}: expected {EXPECTED.get(kind, fault['msg'])}, found {describe(value)}"


def one_of(value: Any, choices: Sequence[Any], where: str) -> str:
    close = nearest(value, choices) if isinstance(value, str) else ""
    return f"{where}: {describe(value)} is not one of: {', '.join(map(str, choices))}{close}"


def nearest_key(schema: Declared, place: KeyPath, values: Any) -> str:
    """'; did you mean …?' with a key of the same block, or of one below it."""
    block, unknown = schema.at(place[:-1], values), str(place[-1])
    inside = [f"{name}.{key}" for name in block.keys for key in block.below(name).keys]
    moved = [name for name in inside if name.endswith(f".{unknown}")]
    return did_you_mean(moved[0]) if moved else nearest(unknown, [*block.keys, *inside])
