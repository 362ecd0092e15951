"""The learning rate of an optimizer step: linear warm-up, then cosine, linear or no decay."""

import math
from typing import Literal


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    warmup_ratio: float,
    min_ratio: float,
    kind: Literal["cosine", "constant", "linear"] = "cosine",
) -> float:
    """Learning rate of optimizer step `step`, the first being 0.

    With W = ceil(warmup_ratio * total_steps) warm-up steps, step s < W has peak * (s + 1) / W: the first step is not
    wasted on a rate of 0, and step W - 1 has the peak. From there, with p the progress from 0 at that step (at step 0
    without warm-up) to 1 at the last step:

        cosine    peak * (min_ratio + (1 - min_ratio) * (1 + cos(pi p)) / 2)        (SGDR, arXiv 1608.03983, Eq 5)
        linear    peak * (min_ratio + (1 - min_ratio) * (1 - p))
        constant  peak, whatever min_ratio

    The last step of a decay has min_ratio * peak: with a min_ratio of 0 it changes nothing.

    Args:
        total_steps: optimizer steps of the whole run (not micro-batches), at least 1.
        peak: the highest learning rate.
        warmup_ratio, min_ratio: in [0, 1].
    Raises:
        ValueError: a step outside [0, total_steps), an unknown kind: a wrong horizon would never reach the floor.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside the {total_steps} steps of the schedule")
    if kind not in ("cosine", "linear", "constant"):
        raise ValueError(f"schedule must be cosine, linear or constant, found {kind!r}")
    # 0.07 * 100 is a little above 7 in floating point, and must not become 8 steps.
    warmup_steps = math.ceil(round(warmup_ratio * total_steps, 9))
    peak_step = max(warmup_steps - 1, 0)
    if step <= peak_step:
        return peak * (step + 1) / max(warmup_steps, 1)
    progress = (step - peak_step) / (total_steps - 1 - peak_step)
    if kind == "cosine":
        return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2)
    if kind == "linear":
        return peak * (min_ratio + (1 - min_ratio) * (1 - progress))
    return peak
