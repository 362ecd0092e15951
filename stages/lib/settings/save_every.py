"""Whole model folders that a training stage keeps of the way, beside the one that it ends with."""

from stages.lib.settings.bounds import Count
from stages.lib.settings.declaration import Settings, key


class SaveEvery(Settings):
    """Folders models/<name>/step_<n>, each loadable by itself; the last step's is models/<name> alone."""

    steps: Count = key(500, "between two of them; in RL rollout phases", unit="optimizer steps")
    keep_last_k: Count | None = key(None, "how many of them stay, the newest; null: all")


def save_every() -> SaveEvery | None:
    """Declares the key of a section that may ask for them."""
    return key(None, "null: no model folders of the way are kept, else a block: models/<name>/step_<n>")
