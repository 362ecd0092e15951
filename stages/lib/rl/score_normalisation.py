"""From a raw score to the reward of an episode: running normalisation, clipping, what becomes of truncated ones."""

import math
from typing import Any

import torch

from stages.lib.settings.truncated import Truncated


class RunningMoments:
    """Mean and standard deviation of everything seen so far, merged batch by batch (Chan, Golub and LeVeque 1979).

    With d the difference of the two means:

        count = n_a + n_b,   mean = mean_a + d n_b / count,   M2 = M2_a + M2_b + d^2 n_a n_b / count

    Held in float64. With several processes, gather the scores first and update everywhere with all of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squared_deviations = 0.0

    @property
    def standard_deviation(self) -> float:
        """Of a sample, dividing by count - 1; 1.0 before two values have been seen."""
        if self.count < 2:
            return 1.0
        return math.sqrt(self.squared_deviations / (self.count - 1))

    def update(self, values: torch.Tensor) -> None:
        """Take in one batch of raw scores, (b,); an empty batch changes nothing."""
        batch = values.detach().double().cpu()
        batch_count = batch.numel()
        if batch_count == 0:
            return
        batch_mean = float(batch.mean())
        batch_squared_deviations = float(((batch - batch_mean) ** 2).sum())
        count = self.count + batch_count
        difference = batch_mean - self.mean
        self.squared_deviations += batch_squared_deviations + difference**2 * self.count * batch_count / count
        self.mean += difference * batch_count / count
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squared_deviations": self.squared_deviations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.mean = state["mean"]
        self.squared_deviations = state["squared_deviations"]


def shape_scores(
    scores: torch.Tensor,
    ended: torch.Tensor,
    *,
    clip: float | None = None,
    moments: RunningMoments | None = None,
    truncated: Truncated,
) -> torch.Tensor:
    """Normalise, then clip, then change what was cut off: in this order, and before any baseline is taken off.

    Normalising first puts the clip in units of standard deviations, whatever the reward model's scale. What becomes of
    a response that does not end comes last, so that clipping cannot swallow it and its size does not depend on the
    scale of the scores; its reward may therefore fall below -clip.

    Args:
        scores: raw scores of the reward model, (b,).
        ended: True where the response ends with EOS, (b,).
        clip: scores are held within ±clip, above 0; None for no clipping.
        moments: of the raw scores; None for no normalisation. The caller updates them with the raw scores of this very
            batch before it calls this, so that the first batch is normalised by itself and not by (0, 1).
        truncated: what becomes of the scores of responses that did not end.
    Returns:
        (b,), float32 (float64 if the scores are).
    Raises:
        ValueError: a clip that is not above 0.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"the score clip must be above 0, found {clip}: for no clipping give null")
    shaped = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if moments is not None:
        shaped = (shaped - moments.mean) / math.sqrt(moments.standard_deviation**2 + 1e-8)
    if clip is not None:
        shaped = shaped.clamp(-clip, clip)
    return torch.where(ended, shaped, scores_of_truncated(shaped, truncated))


def scores_of_truncated(scores: torch.Tensor, settings: Truncated) -> torch.Tensor:
    """What responses that were cut off get instead of these scores, (b,).

    A share of the score is taken where it is above 0 alone: a fifth of -1 is -0.2, so a bad response would gain by
    never ending.
    """
    if settings.type == "missing_eos":
        return scores - settings.penalty
    if settings.type == "stop_properly":
        return torch.where(scores > 0, settings.share * scores, scores)
    return torch.full_like(scores, settings.score)
