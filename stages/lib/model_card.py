"""The README.md of a model folder, in the Hub's format: what made these weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_model_card(
    folder: Path, *, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], metrics: Mapping[str, float]
) -> None:
    """Write the card: stage, settings, content hashes of the direct inputs, metrics. No code, date or machine.

    Args:
        inputs: path of each direct data or model input → its SHA-256.
    """
    input_rows = "\n".join(f"| `{path}` | `{digest}` |" for path, digest in sorted(inputs.items()))
    metric_rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in metrics.items())
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\ntags:\n- stagewise\n- {stage}\n---\n\n"
        f"# {stage}\n\nMade by the stage `{stage}` of a stagewise pipeline; `dvc.lock` holds the whole chain.\n\n"
        f"## Settings\n\n```json\n{json.dumps(settings, indent=2, sort_keys=True)}\n```\n\n"
        f"## Inputs\n\n| path | sha256 |\n|---|---|\n{input_rows}\n\n"
        f"## Metrics\n\n| metric | value |\n|---|---|\n{metric_rows}\n",
        encoding="utf-8",
    )
