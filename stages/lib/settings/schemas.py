"""The JSON schemas of params.yaml and runtime.yaml, made of the models that read them."""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from stages.lib.settings.runtime import DATA_STAGES, STAGES, Runtime
from stages.lib.settings.sections import Params

DIALECT = GenerateJsonSchema.schema_dialect
Schema = dict[str, Any]


class WithoutTitles(GenerateJsonSchema):
    """Keys have names; titles made of them say nothing more."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 (pydantic's signature)
        return False


def params_schema() -> Schema:
    """What params.yaml may hold."""
    return {"$schema": DIALECT, **Params.model_json_schema(schema_generator=WithoutTitles)}


def runtime_schema() -> Schema:
    """What runtime.yaml may hold: every key in the section `default`, and some of them in a stage's."""
    one = Runtime.model_json_schema(schema_generator=WithoutTitles)
    shared = one.pop("$defs", {})
    required = one.pop("required")
    overrides = {"anyOf": [{"$ref": "#/$defs/Runtime"}, {"type": "null"}]}
    sections = {
        "default": {
            "$ref": "#/$defs/Runtime",
            "required": required,
            "description": "for every stage that computes; all keys stand here",
        },
        **{stage: overrides | {"description": f"single keys for {stage}"} for stage in (*STAGES, *DATA_STAGES)},
    }
    return {
        "$schema": DIALECT,
        "description": "how the stages run, never what they compute: runtime.yaml",
        "type": "object",
        "additionalProperties": False,
        "required": ["default"],
        "properties": sections,
        "$defs": {**shared, "Runtime": one},
    }
