"""A reference that is replaced by the policy from time to time (ProRL)."""

from stages.lib.settings.bounds import Count
from stages.lib.settings.declaration import Settings, key


class ReferenceReset(Settings):
    """How often the reference becomes the policy as it is."""

    every: Count = key(
        10,
        "between two resets: the KL, and what is said of it, is to the policy of the last one",
        unit="rollout phases",
        source="arXiv 2505.24864",
    )
