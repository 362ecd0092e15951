"""Supervised rows that are mixed into the updates of a policy (PPO-ptx)."""

from stages.lib.settings.bounds import Count, Positive
from stages.lib.settings.declaration import Settings, key


class PtxSettings(Settings):
    """How many rows each update of the policy reads besides, and how much their loss counts."""

    coef: Positive = key(
        27.8, "γ, of their cross-entropy per token in the policy's loss", source="arXiv 2203.02155, Eq 2, appendix C.4"
    )
    batch_size: Count = key(64, "in an optimizer step of the policy, over all processes", unit="rows")
