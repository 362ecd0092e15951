"""Reading params.yaml: a section becomes its settings, or one message says which key is wrong.

Every key that is declared must be in the file and every key of the file must be declared: nothing is filled in, so
`params.yaml` is the whole truth about a run. Only YAML 1.2 is read (as DVC reads it): `1e-5` is a number.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Lt
from pydantic import Strict, TypeAdapter, ValidationError

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.command.strict_yaml import load_yaml, short
from stages.lib.command.wrong_values import refusal

PARAMS_FILE = Path("params.yaml")
GRAPH_FILE = Path("dvc.yaml")
Seed = Annotated[int, Strict(), Ge(0), Lt(2**32)]  # what every generator of random numbers here takes
Built = TypeVar("Built")


def read_params(section: str, settings: type[Built], path: Path = PARAMS_FILE) -> Built:
    """Read one top-level section of `params.yaml` as the model `settings`.

    Raises:
        StageError: the file is missing or malformed, a key is unknown (the nearest known key is named), missing, of the
            wrong type or out of bounds, or the model's own check refuses it.
    """
    document = load_yaml(path)
    refuse_unread_sections(document, path)
    if section not in document:
        raise StageError(f"{path}: section '{section}' is missing{nearest(section, document)}")
    return build(settings, document[section], f"{path}: {section}")


def read_value(key: str, kind: Any, path: Path = PARAMS_FILE) -> Any:
    """Read one top-level value, such as `seed`, checked to be of type `kind`."""
    if key == "seed":
        return _top_value(key, Seed, path)
    return _top_value(key, Annotated[kind, Strict()] if isinstance(kind, type) else kind, path)


def read_seed(settings: Any, path: Path = PARAMS_FILE) -> int:
    """The seed of a section that may have its own (`settings.seed`), or else the common one."""
    return _top_value("seed", Seed, path) if settings.seed is None else settings.seed


def _top_value(key: str, kind: Any, path: Path) -> Any:
    document = load_yaml(path)
    if key not in document:
        raise StageError(f"{path}: key '{key}' is missing{nearest(key, document)}")
    return build(kind, document[key], f"{path}: {key}")


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
    stages = [stage.get("do", stage) for stage in graph.get("stages", {}).values()]
    return {str(entry).split(".")[0] for stage in stages for entry in stage.get("params") or []}


def build(kind: type[Built], values: Any, where: str) -> Built:
    """`values` as what `kind` says, such as a model of settings. Raises StageError, beginning with `where`."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise StageError(refusal(error, kind, values, where)) from None
