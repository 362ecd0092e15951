"""How settings are declared: a frozen pydantic model for each mapping of a YAML file, and each key with its default.

The default is that of the default run. It is shown (`make explain`, the schemas, a message on a missing key) and never
filled in: params.yaml is the whole truth about a run.
"""

from copy import deepcopy
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Keys and values of one mapping: every key must be there, and no other; nothing is converted but int to float."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


def key(default: Any, says: str, *, unit: str | None = None, source: str | None = None) -> Any:
    """Declare a field of a `Settings` model.

    Args:
        default: its value in the default run, as YAML would have it.
        says: what it sets, in a few words.
        unit: of a number; shown in brackets before the words.
        source: paper and equation; shown in parentheses behind them.
    """
    description = (f"[{unit}] " if unit else "") + says + (f" ({source})" if source else "")
    return Field(description=description, json_schema_extra={"default": default})


def block(model: type[Settings], /, **changed: Any) -> dict[str, Any]:
    """The defaults of a model's keys, with some `changed`, as the default of a key that holds such a block."""
    unknown = changed.keys() - model.model_fields.keys()
    if unknown:
        raise ValueError(f"{model.__name__} has no key {', '.join(sorted(unknown))}")
    extras = {name: cast(dict[str, Any], field.json_schema_extra) for name, field in model.model_fields.items()}
    defaults = {name: extra["default"] for name, extra in extras.items()}
    return deepcopy(defaults | changed)


def plain(settings: Any) -> Any:
    """Settings as plain JSON values, for model cards and fingerprints of runs; any other value is returned as it is."""
    if isinstance(settings, dict):
        return {name: plain(value) for name, value in settings.items()}
    return settings.model_dump() if isinstance(settings, BaseModel) else settings
