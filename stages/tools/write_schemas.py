"""Write the JSON schemas of params.yaml and runtime.yaml, which editors complete and check the files by.

python -m stages.tools.write_schemas
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.lib.command.outputs import written_whole
from stages.lib.command.run import run
from stages.lib.settings.schemas import params_schema, runtime_schema

SCHEMAS = {"params.schema.json": params_schema, "runtime.schema.json": runtime_schema}


def schema_text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main(out: Annotated[Path, typer.Option(help="The folder to write them to.")] = Path("schemas")) -> None:
    """Write the JSON schemas of the settings files."""
    out.mkdir(exist_ok=True)
    for name, schema in SCHEMAS.items():
        with written_whole(out / name) as (partial,):
            partial.write_text(schema_text(schema()), encoding="utf-8")


if __name__ == "__main__":
    run(main)
