"""What a held-out evaluation of a policy measures, by the names of its curve behind validation/."""

from collections.abc import Iterable, Sequence

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.settings.held_out import HeldOutSettings
from stages.lib.settings.reward_columns import part_columns

METRICS = (
    "objective/scores",
    "objective/rewards",
    "objective/rlhf_reward",
    "objective/kl",
    "response/length",
    "response/eos_rate",
    "policy/entropy",
)


def held_out_metrics(parts: Sequence[str], sources: Iterable[str], *, has_reference: bool) -> list[str]:
    """`METRICS`, and where there are several rewards or sources the mean of each reward, as of a verifier.

    Args:
        parts: names of the parts of the reward.
        sources: of the prompts.
    """
    metrics = [metric for metric in METRICS if has_reference or metric != "objective/kl"]
    return metrics + [column for columns in part_columns(parts, sources).values() for column in columns]


def require_compared_metric(held_out: HeldOutSettings, metrics: Sequence[str], key: str) -> None:
    """Raise StageError, naming the entry `key`, if evaluations are compared by an unknown metric."""
    name = held_out.best_by.metric
    if name not in metrics:
        raise StageError(
            f"params.yaml: {key}.held_out.best_by.metric: there is no metric {name!r} here{nearest(name, metrics)}; "
            f"there are {', '.join(metrics)}"
        )
