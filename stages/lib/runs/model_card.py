"""The README.md of a model folder, in the Hub's format: what made these weights.

Source of the front matter's keys: https://huggingface.co/docs/hub/model-cards.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TASKS = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}


def write_model_card(
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    metrics: Mapping[str, float],
    base_model: str | None = None,
) -> None:
    """Write the card: stage, settings, content hashes of the direct inputs, metrics. No code, date or machine.

    Code hashes, or the cards of the inputs, would change the folder, and retrain all that follows, after a comment.

    Args:
        folder: the saved model; the task is that of its architecture.
        inputs: path of each direct data or model input → its hash as `dvc.lock` has it.
        base_model: name on the Hub of the model that the stage started from, if it came from there.
    """
    rows = sorted((shareable_path(path), digest) for path, digest in inputs.items())
    input_rows = "\n".join(f"| `{path}` | `{digest}` |" for path, digest in rows)
    metric_rows = "\n".join(f"| {name} | {_number(value)} |" for name, value in metrics.items())
    (folder / "README.md").write_text(
        f"---\n{_front_matter(stage, _task(folder), base_model)}---\n\n"
        f"# {stage}\n\nMade by the stage `{stage}` of a stagewise pipeline; `dvc.lock` holds the whole chain.\n\n"
        f"## Settings\n\n```json\n{json.dumps(settings, indent=2, sort_keys=True)}\n```\n\n"
        f"## Inputs\n\nHashes as in `dvc.lock`: MD5 of a file, or of the listing of a folder.\n\n"
        f"| path | hash |\n|---|---|\n{input_rows}\n\n"
        f"## Metrics\n\n| metric | value |\n|---|---|\n{metric_rows}\n",
        encoding="utf-8",
    )


def shareable_path(path: str) -> str:
    """A path as it stands or, where it says how a machine's disk is laid out, its last part."""
    return Path(path).name if Path(path).is_absolute() else path


def _front_matter(stage: str, task: str | None, base_model: str | None) -> str:
    lines = ["library_name: transformers"]
    lines += [f"pipeline_tag: {task}"] if task else []
    lines += [f"base_model: {json.dumps(base_model)}"] if base_model else []
    return "\n".join([*lines, "tags:", "- stagewise", f"- {stage.partition('@')[0]}", ""])


def _task(folder: Path) -> str | None:
    """The Hub's name for what the saved architecture does, or None if there is none."""
    config = folder / "config.json"
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    (architecture,) = (architectures or [""])[:1]
    return next((task for ending, task in TASKS.items() if architecture.endswith(ending)), None)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"
