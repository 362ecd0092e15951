"""The settings of a load-balancing loss on the routers of a mixture of experts."""

from typing import Literal

from stages.lib.settings.bounds import Positive
from stages.lib.settings.declaration import Settings, key


class RouterLoss(Settings):
    """N Σ_i f_i P_i over N experts: how often each is chosen, times its mean gate probability (arXiv 2101.03961)."""

    coefficient: Positive = key(
        0.001, "weight beside the stage's own loss; a model may name one in its config.json, router_aux_loss_coef"
    )
    over: Literal["sequence", "batch"] = key(
        "batch",
        "where experts are to be balanced: in every sequence, or over all of an optimizer step, which lets them "
        "specialise and takes one more forward pass",
        source="arXiv 2501.11873, section 3",
    )
