"""Which of its items a stage with several runs for, such as `sft` of `tokenize_data@sft`.

DVC says so in the environment: a command in dvc.yaml that named the item would hand a value of params.yaml to a shell.
"""

import os

from stages.lib.command.errors import StageError

DVC_STAGE = "DVC_STAGE"  # set by DVC for the command that it runs: the stage's name, and its item behind an @


def item_of_stage(given: str | None, option: str) -> str:
    """The item that this process runs for: that of the command line, or else that of the stage which DVC runs.

    Args:
        given: what the command line says, if it says anything.
        option: its name there, for the message.
    Raises:
        StageError: neither says it.
    """
    item = given or os.environ.get(DVC_STAGE, "").partition("@")[2]
    if not item:
        raise StageError(f"give {option}: only where DVC runs the stage does its name say it")
    return item
