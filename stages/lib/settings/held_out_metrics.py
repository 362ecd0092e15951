"""What a held-out evaluation of a policy measures, by the names of its curve behind validation/."""

from collections.abc import Iterable, Sequence

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
