"""How a policy that is trained on its own responses is evaluated on validation prompts, and what that decides."""

from typing import Literal

from stages.lib.settings.bounds import Count, NotNegative
from stages.lib.settings.declaration import Settings, block, key
from stages.lib.settings.epochs import BestBy, EarlyStopping


class HeldOutSettings(Settings):
    """Each evaluation has the same prompts and random numbers, so two of them differ by the weights alone."""

    every: Count = key(5, "between two evaluations; the last phase is always evaluated", unit="phases")
    prompts: Count | None = key(64, "the first of the validation split; null: all of them", unit="prompts")
    kl_weight: NotNegative = key(
        0.05, "of the KL in validation/objective/rlhf_reward, the mean reward less kl_weight times the KL"
    )
    keep: Literal["best", "last"] = key("last", "weights to publish; best: those of the best evaluation")
    best_by: BestBy = key(
        block(BestBy, metric="objective/rlhf_reward", better="higher"),
        "what keep: best and early_stopping compare evaluations by; rewards/<name>: one of several rewards, "
        "rewards/<name>/<source>: that on the prompts of one of several sources",
    )
    early_stopping: EarlyStopping | None = key(None, "null: every phase is made; else a block: patience, min_delta")


def held_out() -> HeldOutSettings | None:
    """Declares the key of a section whose policy may be evaluated while it trains."""
    return key(block(HeldOutSettings), "evaluation on validation prompts; null: none, the last weights are published")
