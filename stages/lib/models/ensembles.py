"""The folder of an ensemble: one file of JSON for each reward model in it, as `ensemble_member` writes them."""

from pathlib import Path

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash
from stages.lib.command.jsonl import read_json
from stages.lib.command.params import build
from stages.lib.settings.ensemble_member import EnsembleMember


def is_ensemble(path: Path) -> bool:
    """Whether a folder is one of an ensemble, rather than of a reward model."""
    return path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.json"))


def member_names(path: Path) -> list[str]:
    """The names of an ensemble's members, sorted."""
    return sorted(file.stem for file in path.glob("*.json"))


def read_members(path: Path) -> dict[str, EnsembleMember]:
    """The members of an ensemble by their names.

    Raises:
        StageError: a file is no member's, or its model is not what it was then.
    """
    members = {}
    for name in member_names(path):
        file = path / f"{name}.json"
        values = read_json(file)
        if not isinstance(values, dict) or not isinstance(values.get("content"), str):
            raise StageError(f"{file}: not what ensemble_member writes; run ensemble_member@{name} again")
        content = values.pop("content")
        members[name] = build(EnsembleMember, values, str(file))
        model = Path(members[name].reward_model)
        if not model.is_dir() or dvc_hash(model) != content:
            raise StageError(f"{file}: {model} is not the model that it was; run ensemble_member@{name} again")
    return members
