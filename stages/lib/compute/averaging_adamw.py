"""AdamW that also keeps an exponential moving average of the weights: a_0 = w_0, a_t = d a_{t-1} + (1 - d) w_t.

The average of the weights passed through generalises better than the last of them (Polyak and Juditsky 1992; in this
form arXiv 1806.04498). It is a state of the optimizer like the moments, so whatever shards, saves or moves those, as
ZeRO does, does the same with it.
"""

from collections.abc import Callable
from typing import Any

import torch

AVERAGE = "average"


class AveragingAdamW(torch.optim.AdamW):
    """torch's AdamW; `decay` is d above, and with None it keeps no average."""

    def __init__(self, params: Any, decay: float | None, **options: Any) -> None:
        super().__init__(params, **options)
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        if self.decay is None:
            return super().step(closure)
        weights = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        # AdamW makes its own states only where it finds none at all, so the average joins them afterwards.
        starts = {weight: weight.detach().clone() for weight in weights if AVERAGE not in self.state[weight]}
        result = super().step(closure)
        for weight in weights:
            if weight in starts:
                self.state[weight][AVERAGE] = starts.pop(weight)
            self.state[weight][AVERAGE].lerp_(weight, 1 - self.decay)
        return result
