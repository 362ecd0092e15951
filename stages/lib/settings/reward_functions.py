"""The files that reward functions are made of."""

from collections.abc import Mapping
from pathlib import Path

from stages.lib.command.errors import StageError
from stages.lib.operations.code_closure import closure
from stages.lib.settings.rewards import FunctionReward, RewardPart

MEASURES = "stages/lib/tasks/"  # what is never trained on


def reward_files(rewards: Mapping[str, RewardPart], key: str) -> list[str]:
    """The files of the functions among some rewards, with what they import of ours and say that they read, sorted.

    Args:
        key: of the rewards in params.yaml.
    Raises:
        StageError: a file is missing or no Python, or imports a task, whose grades are there to measure.
    """
    found: set[str] = set()
    for name, reward in rewards.items():
        if isinstance(reward, FunctionReward):
            found.update(files_of_function(reward.path, f"params.yaml: {key}.{name}.path"))
            for file in reward.files:
                found.update(files_of_function(file, f"params.yaml: {key}.{name}.files"))
    return sorted(found)


def files_of_function(path: str, where: str) -> list[str]:
    """The same of one function, such as rewards/example.py:score, or of one file."""
    file = path.partition(":")[0]
    if not Path(file).is_file():
        raise StageError(f"{where}: the file {file} does not exist")
    try:
        files = closure([file])
    except (SyntaxError, ValueError) as error:
        raise StageError(f"{where}: {file}, or what it imports, is no Python: {error}") from None
    measures = [other for other in files if other.startswith(MEASURES)]
    if measures:
        raise StageError(
            f"{where}: {file} imports {measures[0]}, which exists to measure policies; nothing may be trained on it"
        )
    return files
