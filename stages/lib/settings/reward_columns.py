"""The columns of a curve that say what each part of a reward said."""

from collections.abc import Iterable, Sequence

from stages.lib.settings.rewards import REWARD_MODEL

KINDS = ("error", "timeout")  # of failures


def part_columns(names: Sequence[str], sources: Iterable[str]) -> dict[str, list[str]]:
    """The columns of each part's mean, on all rows and on each source's; none where a reward model is alone on one.

    Args:
        names: of the parts of a mixture.
        sources: of the prompts.
    """
    several = sorted(set(sources))
    if [*names] == [REWARD_MODEL] and len(several) < 2:
        return {}
    of_each = several if len(several) > 1 else []
    return {name: [f"rewards/{name}", *(f"rewards/{name}/{source}" for source in of_each)] for name in names}


def reward_columns(names: Sequence[str], sources: Iterable[str]) -> tuple[str, ...]:
    """The columns of `reward_metrics`: those of `part_columns`, and behind each part's its failures."""
    columns = []
    for name, means in part_columns(names, sources).items():
        columns += [*means, *(f"reward_{kind}s/{name}" for kind in KINDS)]
    return tuple(columns)
