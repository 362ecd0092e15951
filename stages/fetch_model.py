"""A model of the Hugging Face Hub, at one commit and as it is: a reward model from elsewhere, say.

Nothing in it is changed, so it keeps its own tokenizer, head and card. Weights are those of safetensors files, and
Python code comes along only with `trust_remote_code: true`.

    python -m stages.fetch_model --name judge --out models
"""

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hashes
from stages.lib.command.outputs import written_whole
from stages.lib.command.params import read_value
from stages.lib.command.run import run
from stages.lib.models.given_model import download
from stages.lib.operations.run_log import log_run
from stages.lib.settings.fetch_model import HubModel


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the model's folder into, which has its name.")],
    name: EntryOption = None,
) -> None:
    """Bring a model of the Hub."""
    started = time.monotonic()
    name, settings = read_entry("fetch_model", HubModel, name)
    folder = download(settings.model, settings.revision, trust_remote_code=read_value("trust_remote_code", bool))
    if not any(folder.rglob("*.safetensors")):
        raise StageError(f"Hub model {settings.model} has no weights in safetensors files, and no others are read")
    with written_whole(out / name) as (target,):
        shutil.copytree(folder, target)  # the cache's links become files
    log_run(f"fetch_model@{name}", dvc_hashes([out / name]), time.monotonic() - started)
    print(f"{out / name}: {settings.model} at {settings.revision}")


if __name__ == "__main__":
    run(main)
