"""One of the reward models of an ensemble: where it is, how it is read, and what it weighs, in a file of JSON.

A graph can make a stage depend on one path of its entry, and an ensemble is several. So each member writes a file into
the ensemble's folder, which a training stage names where it would name a reward model. The file holds the hash of the
model's content: another model, another file.

    python -m stages.ensemble_member --name first --out data/ensembles
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash, dvc_hashes
from stages.lib.command.jsonl import write_json
from stages.lib.command.outputs import written_whole
from stages.lib.command.run import run
from stages.lib.models.reward_head import find_reward_head, score_scale
from stages.lib.operations.run_log import log_run
from stages.lib.settings.declaration import plain
from stages.lib.settings.ensemble_member import EnsembleMember


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the ensemble's folder into, which has its name.")],
    name: EntryOption = None,
) -> None:
    """Write down a member of an ensemble."""
    started = time.monotonic()
    name, settings = read_entry("ensemble_member", EnsembleMember, name)
    model = Path(settings.reward_model)
    if not model.is_dir():
        raise StageError(f"params.yaml: ensemble_member.{name}.reward_model: the folder {model} does not exist")
    head = find_reward_head(model, settings)
    if settings.standardise_reward:
        score_scale(model, head)
    path = out / settings.ensemble / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as (partial,):
        write_json(partial, plain(settings) | {"content": dvc_hash(model)})
    log_run(f"ensemble_member@{name}", dvc_hashes([path]), time.monotonic() - started)
    print(f"{path}: {model}, weight {settings.weight:g}")


if __name__ == "__main__":
    run(main)
