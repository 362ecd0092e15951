"""Strict settings: a section of a YAML file becomes a frozen dataclass, or one message says which key is wrong.

Every field of the dataclass must be in the file and every key of the file must be a field: no defaults in code, so
`params.yaml` is the whole truth about a run. Only YAML 1.2 is read (as DVC reads it): `1e-5` is a number. A field's
bounds stand in its type, such as `Annotated[int, Ge(1)]`; without any, a number keeps to `LARGEST_NUMBER`.
"""

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt

from stages.lib.command.errors import StageError
from stages.lib.command.strict_yaml import load_yaml, short

PARAMS_FILE = Path("params.yaml")
GRAPH_FILE = Path("dvc.yaml")
# What a number may be unless its field says otherwise. Torch and Arrow count in 32 bits in places; no rate or weight of
# a billion means anything.
LARGEST_NUMBER = {int: 2**31 - 1, float: 1e9}
LONGEST_TEXT = 4096  # characters, as of a path
BOUNDS = {
    Gt: ("above", operator.gt),
    Ge: ("at least", operator.ge),
    Lt: ("below", operator.lt),
    Le: ("at most", operator.le),
}
KINDS_OF_ANY = {
    dict: dict[str, Any],
    list: tuple[Any, ...],
    str: str,
    bool: bool,
    int: Annotated[int, Ge(-(2**63)), Lt(2**63)],
    float: Annotated[float, Ge(-1e300), Le(1e300)],
}
Seed = Annotated[int, Ge(0), Lt(2**32)]  # what every generator of random numbers here takes
Settings = TypeVar("Settings")


def read_params(section: str, settings: type[Settings], path: Path = PARAMS_FILE) -> Settings:
    """Read one top-level section of `params.yaml` into the dataclass `settings`.

    Raises:
        StageError: the file is missing or malformed, a key is unknown (the nearest known key is named), missing or
            of the wrong type, or the dataclass's own `__post_init__` refuses a value with a ValueError.
    """
    document = load_yaml(path)
    refuse_unread_sections(document, path)
    if section not in document:
        raise StageError(f"{path}: section '{section}' is missing{nearest(section, document)}")
    return build(settings, document[section], f"{path}: {section}")


def read_value(key: str, kind: type, path: Path = PARAMS_FILE) -> Any:
    """Read one top-level value, such as `seed`, checked to be of type `kind`."""
    document = load_yaml(path)
    if key not in document:
        raise StageError(f"{path}: key '{key}' is missing{nearest(key, document)}")
    return convert(document[key], Seed if key == "seed" else kind, f"{path}: {key}")


def read_seed(settings: Any, path: Path = PARAMS_FILE) -> int:
    """The seed of a section that may have its own (`settings.seed`), or else the common one."""
    return read_value("seed", int, path) if settings.seed is None else settings.seed


def refuse_unread_sections(document: dict[str, Any], path: Path) -> None:
    """Refuse a top-level key that no stage of `dvc.yaml` declares: it would be a setting that nothing obeys."""
    if path != PARAMS_FILE or not GRAPH_FILE.is_file():
        return
    known = declared_sections(load_yaml(GRAPH_FILE))
    for key in document:
        if key not in known:
            raise StageError(f"{path}: no stage reads '{short(key)}'{nearest(key, known)}")


def declared_sections(graph: dict[str, Any]) -> set[str]:
    """The top-level params keys that the stages of a `dvc.yaml` declare."""
    return {
        str(entry).split(".")[0] for stage in graph.get("stages", {}).values() for entry in stage.get("params") or []
    }


def build(settings: type[Settings], values: Any, where: str) -> Settings:
    """Build the dataclass `settings` from a mapping, strictly. `where` prefixes every message."""
    if not isinstance(values, dict):
        raise StageError(f"{where}: expected a section with keys, found {describe(values)}")
    names = [field.name for field in dataclasses.fields(settings)]
    for key in values:
        if key not in names:
            raise StageError(f"{where}.{short(key)} is not a known key{nearest(key, names)}")
    for name in names:
        if name not in values:
            raise StageError(f"{where}.{name} is missing{nearest(name, values)}")
    kinds = typing.get_type_hints(settings, include_extras=True)
    converted = {name: convert(values[name], kinds[name], f"{where}.{name}") for name in names}
    try:
        return settings(**converted)
    except ValueError as error:
        raise StageError(f"{where}: {error}") from None


def convert(value: Any, kind: Any, where: str) -> Any:
    """Check `value` against the type `kind` and return it (an int where a float is wanted becomes a float)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return within(convert_scalar(value, arguments[0], where), arguments[1:], where)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        lists = [argument for argument in inner if typing.get_origin(argument) is tuple]
        return convert(value, lists[0] if lists and isinstance(value, list) else inner[0], where)
    if origin is typing.Literal:
        return one_of(value, arguments, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise StageError(f"{where}: expected a list, found {describe(value)}")
        return tuple(convert(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise StageError(f"{where}: expected a mapping, found {describe(value)}")
        return {
            convert(key, str, f"a key of {where}"): convert(item, arguments[1], f"{where}.{short(key)}")
            for key, item in value.items()
        }
    if kind is typing.Any:
        return any_value(value, where)
    return within(convert_scalar(value, kind, where), (), where)


def one_of(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    close = nearest(value, choices) if isinstance(value, str) else ""
    raise StageError(f"{where}: {describe(value)} is not one of: {', '.join(map(str, choices))}{close}")


def any_value(value: Any, where: str) -> Any:
    """A value of a section whose keys belong to another program: what JSON can hold, to any depth."""
    if value is None:
        return None
    if type(value) not in KINDS_OF_ANY:
        raise StageError(f"{where}: expected a number, text, true, false, keys or a list, found {describe(value)}")
    converted = convert(value, KINDS_OF_ANY[type(value)], where)
    return list(converted) if isinstance(value, list) else converted


def convert_scalar(value: Any, kind: type, where: str) -> Any:
    if kind is float and type(value) is int:
        value = as_float(value, where)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise StageError(f"{where}: expected a finite number, found {value}")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise StageError(f"{where}: expected {names.get(kind, kind.__name__)}, found {describe(value)}")
    if kind is str:
        refuse_unusable_text(value, where)
    return value


def as_float(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise StageError(f"{where}: expected a number that a float can hold, found {describe(value)}") from None


def refuse_unusable_text(text: str, where: str) -> None:
    """Refuse what can be no name, path or token."""
    if not 1 <= len(text) <= LONGEST_TEXT:
        raise StageError(f"{where}: expected a text of 1 to {LONGEST_TEXT} characters, found {describe(text)}")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise StageError(f"{where}: the text {describe(text)} holds a character that no file can")


def within(value: Any, bounds: tuple[Any, ...], where: str) -> Any:
    """`value`, if it is a number within `bounds`, and within those of any number on a side that has none."""
    largest = None if isinstance(value, bool) else LARGEST_NUMBER.get(type(value))
    if largest is None:
        return value
    lower = next((bound for bound in bounds if isinstance(bound, Gt | Ge)), Ge(-largest))
    upper = next((bound for bound in bounds if isinstance(bound, Lt | Le)), Le(largest))
    shown = [bound for bound in (lower, upper) if bound in bounds or not holds(value, bound)]
    if not (holds(value, lower) and holds(value, upper)):
        raise StageError(f"{where} must be {' and '.join(map(words, shown))}, found {describe_number(value)}")
    return value


def holds(value: float, bound: Gt | Ge | Lt | Le) -> bool:
    return BOUNDS[type(bound)][1](value, limit_of(bound))


def words(bound: Gt | Ge | Lt | Le) -> str:
    return f"{BOUNDS[type(bound)][0]} {limit_of(bound)}"


def limit_of(bound: Gt | Ge | Lt | Le) -> float:
    return getattr(bound, type(bound).__name__.lower())


def describe(value: Any) -> str:
    """A value and its type, in few words however large it is."""
    return "nothing" if value is None else f"{describe_number(value)} ({type(value).__name__})"


def describe_number(value: Any) -> str:
    try:
        return short(repr(value))
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"


def nearest(key: str, known: Iterable[Any]) -> str:
    """', did you mean …?' with the known key that is closest to `key`, or nothing if none is close."""
    matches = difflib.get_close_matches(key[:LONGEST_TEXT], [str(name) for name in known], n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
