"""How rewards become advantages without a critic, each way with the keys it has; see rl/advantages.py."""

from typing import Annotated, Literal

from pydantic import Field

from stages.lib.settings.bounds import Positive, Share
from stages.lib.settings.declaration import Settings, key


def epsilon() -> Positive:
    """Declare what keeps differences that are next to none from being blown up."""
    return key(1e-4, "added to the standard deviation", unit="of the reward")


class GroupRelative(Settings):
    """GRPO's: by how much a response's reward is above the mean of its prompt's samples."""

    type: Literal["group_relative"] = key(
        "group_relative", "GRPO: the reward less its group's mean", source="arXiv 2402.03300, section 4.1.2"
    )
    scale: Literal["group_std", "batch_std", "none"] = key(
        "group_std",
        "what the difference is divided by: the standard deviation of the group's rewards; of all rewards of the phase "
        "(arXiv 2508.08221); 1, as Dr. GRPO has it (arXiv 2503.20783)",
        source="arXiv 2402.03300",
    )
    epsilon: Positive = epsilon()


class LeaveOneOut(Settings):
    """RLOO's."""

    type: Literal["leave_one_out"] = key(
        "leave_one_out", "RLOO: the reward less the mean of the group's other rewards", source="arXiv 2402.14740, Eq 8"
    )


class RewardsToCome(Settings):
    """What the advantages of REINFORCE++ share."""

    type: str = key("", "of the advantages")
    gamma: Share = key(1.0, "discount of the rewards to come", source="arXiv 2501.03262")
    scale: Literal["batch_std", "none"] = key(
        "batch_std",
        "divided by the standard deviation over all tokens of the phase, or by 1",
        source="arXiv 2501.03262",
    )


class Reinforce(RewardsToCome):
    """REINFORCE++'s, for any number of samples of a prompt."""

    type: Literal["reinforce"] = key(
        "reinforce", "REINFORCE++: each token's rewards to come, less the mean of the phase", source="arXiv 2501.03262"
    )


class ReinforceBaseline(RewardsToCome):
    """REINFORCE++-baseline's."""

    type: Literal["reinforce_baseline"] = key(
        "reinforce_baseline",
        "REINFORCE++-baseline: each token's rewards to come, less the mean reward of the group, then as reinforce",
        source="arXiv 2501.03262",
    )


class Gdpo(Settings):
    """GDPO's, for several rewards: none drowns the others because it varies more."""

    type: Literal["gdpo"] = key(
        "gdpo",
        "GDPO: each reward is standardised in its group, their weighted sum over the phase",
        source="arXiv 2601.05242",
    )
    epsilon: Positive = epsilon()


class MaxRl(Settings):
    """MaxRL's: the harder a prompt, the more its successes count, as in maximum likelihood."""

    type: Literal["max_rl"] = key(
        "max_rl",
        "MaxRL: the reward less its group's mean, divided by that mean; no reward may be below 0",
        source="arXiv 2602.02710",
    )


Advantages = Annotated[
    GroupRelative | LeaveOneOut | Reinforce | ReinforceBaseline | Gdpo | MaxRl, Field(discriminator="type")
]


def needs_groups(advantages: Advantages) -> bool:
    """Whether a prompt needs at least two samples."""
    return advantages.type != "reinforce"
