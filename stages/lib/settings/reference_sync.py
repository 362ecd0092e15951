"""A reference that follows the policy (TR-DPO)."""

from typing import Annotated

from annotated_types import Gt, Le

from stages.lib.settings.bounds import Count
from stages.lib.settings.declaration import Settings, key


class ReferenceSync(Settings):
    """How often and how far the reference moves to the policy."""

    every: Count = key(512, "between two moves of the reference", unit="optimizer steps", source="arXiv 2404.09656")
    mixup: Annotated[float, Gt(0), Le(1)] = key(
        0.6, "α: the reference becomes α times the policy and 1 − α times itself", source="arXiv 2404.09656"
    )
