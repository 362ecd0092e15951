"""pass@k: how often at least one of k responses to a prompt is right, an unbiased estimate from n samples of each."""

from collections.abc import Mapping, Sequence
from math import comb

from stages.lib.evaluation.intervals import paired_bootstrap_interval
from stages.lib.evaluation.metrics import mean


def pass_at_k(right: int, samples: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): the chance that of n samples k without replacement hold one of the c right.

    Source: arXiv 2107.03374, Eq 1.

    Raises:
        ValueError: not 1 ≤ k ≤ samples, or right is not in 0 to samples.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"expected 1 <= k <= samples and 0 <= right <= samples, found {k}, {samples}, {right}")
    return 1 - comb(samples - right, k) / comb(samples, k)


def pass_metrics(
    scores: Mapping[str, Sequence[Sequence[float | None]]], above: float, ks: Sequence[int], resamples: int, seed: int
) -> dict[str, float]:
    """Of each measure and k the mean over prompts, with a 95 % interval over prompts: `<measure>_pass_at_<k>`.

    Args:
        scores: by measure, of each prompt's samples; None: the measure does not apply, and the prompt does not count.
        above: what is right is above this.
    """
    found: dict[str, float] = {}
    for measure, prompts in scores.items():
        applies = [samples for samples in prompts if None not in samples]
        for k in ks if applies else ():
            right = [sum(score is not None and score > above for score in samples) for samples in applies]
            chances = [pass_at_k(count, len(samples), k) for count, samples in zip(right, applies, strict=True)]
            low, high = paired_bootstrap_interval(chances, seed, resamples)
            name = f"{measure}_pass_at_{k}"
            found |= {name: mean(chances), f"{name}_ci_low": low, f"{name}_ci_high": high}
    return found
