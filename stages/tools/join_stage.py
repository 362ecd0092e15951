"""Take part from another machine in a stage that DVC runs on the first one: the same command, read from dvc.yaml.

    LAUNCH="torchrun --nnodes=2 … -m" python -m stages.tools.join_stage --stage train_sft

LAUNCH is that of the first machine. DVC only reads the command here; it records nothing.
"""

import os
import shlex
from typing import Annotated

import typer

from stages.lib.command.errors import StageError
from stages.lib.command.run import run


def main(stage: Annotated[str, typer.Option()]) -> None:
    """Run the processes of STAGE that $LAUNCH puts on this machine."""
    launch = os.environ.get("LAUNCH", "")
    if not launch or "--standalone" in launch:
        raise StageError(
            "LAUNCH must name the launcher as on the first machine, such as torchrun with --nnodes; "
            f"it is {launch!r}, with which this machine would run the stage by itself"
        )
    name, command = stage_here(stage)
    words = shlex.split(command)
    print(f"{name} > {shlex.join(words)}", flush=True)
    os.environ["DVC_STAGE"] = name  # as DVC says it on the first machine: which entry of its section it is
    os.execvp(words[0], words)


def stage_here(stage: str) -> tuple[str, str]:
    """The name of a stage of dvc.yaml, and its command; of a group that has but one, its.

    Raises:
        StageError: there is no such stage, there are several, or it starts without a launcher.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        found = list(Repo().stage.collect(stage))
    except DvcException as error:
        raise StageError(str(error)) from None
    if len(found) != 1:
        raise StageError(f"{stage} is several stages; name one of {', '.join(one.addressing for one in found)}")
    if "stages/launch.sh" not in found[0].cmd:
        raise StageError(f"{stage} runs as one process on the first machine; no other takes part")
    return found[0].addressing, found[0].cmd


if __name__ == "__main__":
    run(main)
