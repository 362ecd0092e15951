"""Strict settings: a section of a YAML file becomes a frozen dataclass, or one message says which key is wrong.

Every field of the dataclass must be in the file and every key of the file must be a field: no defaults in code, so
`params.yaml` is the whole truth about a run. Only YAML 1.2 is read (as DVC reads it): `1e-5` is a number.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.lib.errors import StageError

PARAMS_FILE = Path("params.yaml")
GRAPH_FILE = Path("dvc.yaml")
LARGEST_SEED = 2**32  # what every generator of random numbers here takes
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
    value = convert(document[key], kind, f"{path}: {key}")
    if key == "seed" and not 0 <= value < LARGEST_SEED:
        raise StageError(f"{path}: seed must be at least 0 and below {LARGEST_SEED}, found {value}")
    return value


def load_yaml(path: Path) -> dict[str, Any]:
    """Load a YAML 1.2 mapping. Raises StageError naming the file and line if it cannot be read as one."""
    if not path.is_file():
        raise StageError(f"{path} is missing; run from the project's top folder")
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise StageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise StageError(f"{path}: expected sections (key: value), found {type(document).__name__}")
    return document


def refuse_unread_sections(document: dict[str, Any], path: Path) -> None:
    """Refuse a top-level key that no stage of `dvc.yaml` declares: it would be a setting that nothing obeys."""
    if path != PARAMS_FILE or not GRAPH_FILE.is_file():
        return
    known = declared_sections(load_yaml(GRAPH_FILE))
    for key in document:
        if key not in known:
            raise StageError(f"{path}: no stage reads '{key}'{nearest(key, known)}")


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
            raise StageError(f"{where}.{key} is not a known key{nearest(str(key), names)}")
    for name in names:
        if name not in values:
            raise StageError(f"{where}.{name} is missing{nearest(name, values)}")
    kinds = typing.get_type_hints(settings)
    converted = {name: convert(values[name], kinds[name], f"{where}.{name}") for name in names}
    try:
        return settings(**converted)
    except ValueError as error:
        raise StageError(f"{where}: {error}") from None


def convert(value: Any, kind: Any, where: str) -> Any:
    """Check `value` against the type `kind` and return it (an int where a float is wanted becomes a float)."""
    if kind is typing.Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        lists = [argument for argument in inner if typing.get_origin(argument) is tuple]
        return convert(value, lists[0] if lists and isinstance(value, list) else inner[0], where)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool) != isinstance(arguments[0], bool):
            choices = ", ".join(map(str, arguments))
            raise StageError(f"{where}: {describe(value)} is not one of: {choices}{nearest(str(value), arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise StageError(f"{where}: expected a list, found {describe(value)}")
        return tuple(convert(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise StageError(f"{where}: expected a mapping, found {describe(value)}")
        return {str(key): convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    return convert_scalar(value, kind, where)


def convert_scalar(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise StageError(f"{where}: expected a finite number, found {value}")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise StageError(f"{where}: expected {names.get(kind, kind.__name__)}, found {describe(value)}")
    return value


def describe(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def nearest(key: str, known: Iterable[Any]) -> str:
    """', did you mean …?' with the known key that is closest to `key`, or nothing if none is close."""
    matches = difflib.get_close_matches(key, [str(name) for name in known], n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
