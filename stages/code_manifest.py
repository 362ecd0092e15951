"""The first stage: all settings are checked, and a manifest of its code is written for each other stage.

Each stage of dvc.yaml depends on its own manifest alone: a change of code reruns this, and then the stages whose code
it is. A change of settings reruns this, and then the stages that read them.

    python -m stages.code_manifest --out code_manifests    # what DVC runs
    python -m stages.code_manifest --compare               # which code has changed; nothing is written
    python -m stages.code_manifest                         # the check of the settings alone
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from stages.lib.command.errors import one_line
from stages.lib.command.outputs import written_whole
from stages.lib.command.params import GRAPH_FILE, read_params
from stages.lib.command.run import run
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.operations.code_closure import (
    MANIFESTS,
    differing_files,
    lines_of,
    manifest_of,
    script_name,
    with_files,
)
from stages.lib.settings.agreement import TEMPLATES
from stages.lib.settings.check import check_settings, reward_files_of
from stages.lib.settings.prepare_base import PrepareBase
from stages.lib.settings.sections import read_all_params

OWN_NAME = Path(__file__).stem


def manifests() -> dict[str, str]:
    """Script of the stages of dvc.yaml → its manifest."""
    stages = load_yaml(GRAPH_FILE)["stages"].values()
    names = dict.fromkeys(script_name(stage.get("do", stage)["cmd"]) for stage in stages)
    texts = {name: manifest_of(f"stages/{name}.py") for name in names if name != OWN_NAME}
    params = read_all_params()
    texts |= {name: with_files(text, reward_files_of(name, params)) for name, text in texts.items() if name in params}
    return texts | {"prepare_base": texts["prepare_base"] + lines_of(chat_templates())}


def chat_templates() -> list[str]:
    """The files that the models to start from get their chat templates from: chosen by settings, so not in the code."""
    models = read_params("prepare_base", PrepareBase).models.values()
    return sorted({f"{TEMPLATES}/{model.chat_template}" for model in models if model.chat_template})


def changes(folder: Path) -> list[str]:
    """A line for each stage whose code is not what its manifest in `folder` says."""
    lines = []
    for name, text in manifests().items():
        file = folder / f"{name}.txt"
        differing = differing_files(file.read_text(encoding="utf-8") if file.is_file() else "", text)
        if differing:
            lines.append(f"{name}: {', '.join(differing)}")
    return lines


def main(
    out: Annotated[Path | None, typer.Option(help="Folder of the manifests to write.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Say which stages' code has changed; write nothing.")
    ] = False,
) -> None:
    """Check params.yaml and runtime.yaml, and write the manifest of each stage's code."""
    for warning in check_settings():
        print(f"warning: {one_line(warning)}", file=sys.stderr)
    if compare:
        lines = changes(MANIFESTS)
        print(
            "\n  ".join(
                ["Code that has changed since the manifests were written:", *lines] if lines else ["Code: no change."]
            )
        )
    if out is None:
        return
    texts = manifests()
    with written_whole(out) as (partial,):
        partial.mkdir()
        for name, text in texts.items():
            (partial / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)
