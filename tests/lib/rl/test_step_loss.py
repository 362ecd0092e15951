"""The loss of an optimizer step beside one in plain Python's floats, which knows no tensor, mask or weight of a token.

Its gradient is measured by central differences; what a paper holds without gradient is held at its first value.
"""

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.group_loss import step_loss
from stages.lib.rl.rollouts import Rollouts
from stages.lib.rl.token_masks import without_truncated
from stages.lib.settings.declaration import block
from stages.lib.settings.kl_penalty import KlInLoss, NoKl
from stages.lib.settings.policy_loss import (
    BnpoLoss,
    CispoLoss,
    DapoLoss,
    DrGrpoLoss,
    GrpoLoss,
    GspoLoss,
    GspoTokenLoss,
    LuspoLoss,
    SapoLoss,
    VespoLoss,
)
from stages.lib.settings.sections import default_params
from stages.lib.settings.train_grpo import TrainGrpo

LENGTHS, ROWS, LONGEST = [3, 1, 4, 2, 2], [3, 0, 2, 4], 6
ENDED = [True, True, True, False, True]
KL_COEF = 0.3
WIDE = {"low": 0.1, "high": 0.15}
LOSSES = [
    block(GrpoLoss, **WIDE),
    block(GrpoLoss, ratio="sequence", **WIDE),
    block(GrpoLoss, dual_clip=1.3, **WIDE),
    block(DapoLoss, **WIDE),
    block(BnpoLoss, **WIDE),
    block(DrGrpoLoss, dual_clip=1.3, **WIDE),
    block(GspoLoss, **WIDE),
    block(GspoTokenLoss, **WIDE),
    block(LuspoLoss, **WIDE),
    block(CispoLoss, largest_ratio=1.2),
    block(SapoLoss),
    block(VespoLoss),
]
IN_LOSS = [
    block(KlInLoss, estimator=estimator, bias_correction=corrected)
    for estimator, corrected in product(("k2", "k3"), (False, True))
]


def table(generator, scale=1.0):
    """A number for each token; NaN where there is none."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.where(mask, torch.randn(mask.shape, dtype=torch.float64, generator=generator) * scale, math.nan)


@pytest.fixture(scope="module")
def drawn():
    """Rollouts, advantages that are the same at all tokens of a response, and log-probs of a policy that has moved."""
    generator = torch.Generator().manual_seed(3)
    old = table(generator) - 2
    episodes = [
        Episode(Prompt(0, [0], [], {}), [0] * length, "", ended, row, None, [True] * length)
        for row, (length, ended) in enumerate(zip(LENGTHS, ENDED, strict=True))
    ]
    mask, nothing = ~old.isnan(), torch.zeros(len(LENGTHS), dtype=torch.float64)
    rollouts = Rollouts(
        episodes, nothing, old, mask, old, old + table(generator, 0.5), table(generator).abs(), torch.zeros_like(old)
    )
    advantages = torch.where(mask, torch.randn(len(LENGTHS), 1, dtype=torch.float64, generator=generator), 0.0)
    return rollouts, advantages, old + table(generator, 0.3)


def settings_of(**changes):
    sizes = {"max_new_tokens": LONGEST, "minibatch_size": 1, "held_out": None}
    return TrainGrpo.model_validate(default_params()["train_grpo"]["grpo"] | sizes | changes)


def by_tensors(settings, rollouts, advantages, logps):
    """The mean loss of the step and its gradient at each token of ROWS."""
    moving = logps.clone().requires_grad_()
    batch = SimpleNamespace(inputs=(), completion_mask=None, on_completions=lambda values, _: values)
    one = SimpleNamespace(engine=lambda *_: SimpleNamespace(logps=moving[ROWS]), batch=batch, rows=ROWS)
    loss = step_loss(settings, KL_COEF, rollouts, advantages, ROWS)(rollouts, one)["loss"]
    loss = loss / rollouts.response_mask[ROWS].sum()
    loss.backward()
    return loss.item(), moving.grad


def objective(settings, now, first, old, advantage, t):
    """What a token adds to the objective, from the log-probs of its response: now, and held at their first values."""
    loss, length = settings.loss, len(now)
    of_sequence = math.exp(sum(a - b for a, b in zip(now, old, strict=True)) / length)
    held = math.exp(sum(a - b for a, b in zip(first, old, strict=True)) / length)
    if loss.type == "cispo":
        return min(math.exp(first[t] - old[t]), loss.largest_ratio) * advantage * now[t]
    if loss.type == "sapo":
        tau = loss.positive_temperature if advantage > 0 else loss.negative_temperature
        return 4 / tau / (1 + math.exp(-tau * (math.exp(now[t] - old[t]) - 1))) * advantage
    if loss.type == "vespo":
        weight = held**length
        power, decay = (
            (loss.positive_power, loss.positive_decay) if advantage >= 0 else (loss.negative_power, loss.negative_decay)
        )
        return weight**power * math.exp(decay * (1 - weight)) * advantage * now[t]
    sequence = loss.type in ("gspo", "luspo") or getattr(loss, "ratio", "token") == "sequence"
    ratio = of_sequence if sequence else math.exp(now[t] - old[t])
    if loss.type == "gspo_token":
        ratio = held * math.exp(now[t] - first[t])
    found = min(ratio * advantage, min(max(ratio, 1 - loss.low), 1 + loss.high) * advantage)
    return max(found, loss.dual_clip * advantage) if loss.dual_clip and advantage < 0 else found


def divergence(kl, now, first, old, reference):
    """A token's KL in the loss."""
    d = now - reference
    found = d * d / 2 if kl.estimator == "k2" else math.exp(-d) - 1 + d
    if not kl.bias_correction:
        return found
    return found * math.exp((now if kl.estimator == "k3" else first) - old)


def in_plain_python(settings, rollouts, advantages, logps, first):
    """The same loss of log-probs by row, each mean written out as its paper has it."""
    kept = [row for row in ROWS if rollouts.response_mask[row].any()]
    tokens = sum(LENGTHS[row] for row in kept)
    entropies = [rollouts.entropies[row, t].item() for row in kept for t in range(LENGTHS[row])]
    least = np.quantile(entropies, 1 - settings.top_entropy_share, method="higher")
    divided_by = {
        "dr_grpo": lambda _: len(kept) * LONGEST,
        "luspo": lambda _: len(kept),
        **dict.fromkeys(("dapo", "bnpo", "cispo", "vespo"), lambda _: tokens),
    }.get(settings.loss.type, lambda row: len(kept) * LENGTHS[row])
    total = 0.0
    for row in kept:
        old, reference = (part[row, : LENGTHS[row]].tolist() for part in (rollouts.logps, rollouts.reference_logps))
        now, then, advantage = logps[row], first[row], advantages[row, 0].item()
        fallen = sum(a - b for a, b in zip(old, then, strict=True)) / LENGTHS[row]
        left = settings.off_policy_limit is not None and advantage < 0 and fallen > settings.off_policy_limit
        for t in range(LENGTHS[row]):
            counts = rollouts.entropies[row, t].item() >= least and not left
            loss = -objective(settings, now, then, old, advantage, t) if counts else 0.0
            if settings.kl.type == "in_loss":
                loss += KL_COEF * divergence(settings.kl, now[t], then[t], old[t], reference[t])
            total += loss / divided_by(row)
    return total


def agrees(settings, rollouts, advantages, logps):
    """The loss, of which both say the same, as of its gradient at each token."""
    first = [logps[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    loss, gradient = by_tensors(settings, rollouts, advantages, logps)
    assert loss == pytest.approx(in_plain_python(settings, rollouts, advantages, first, first), rel=1e-12)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            moved = []
            for step in (1e-6, -1e-6):
                now = [list(values) for values in first]
                now[row][t] += step
                moved.append(in_plain_python(settings, rollouts, advantages, now, first))
            assert gradient[row, t].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-6, abs=1e-8)
    assert not gradient[~rollouts.response_mask].any()
    return loss


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(str(value) for value in loss.values()))
def test_each_loss_and_its_gradient(drawn, loss):
    agrees(settings_of(loss=loss, kl=block(NoKl)), *drawn)


@pytest.mark.parametrize("kl", IN_LOSS, ids=lambda kl: f"{kl['estimator']}-{kl['bias_correction']}")
def test_each_kl_beside_a_mean_over_tokens_and_one_over_responses(drawn, kl):
    for loss in (LOSSES[0], LOSSES[3]):
        agrees(settings_of(loss=loss, kl=kl), *drawn)


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[3], LOSSES[5]], ids=lambda loss: loss["type"])
def test_what_a_mask_leaves_out(drawn, loss):
    rollouts, advantages, logps = drawn
    masked = {"top_entropy_share": 0.5, "off_policy_limit": 0.05}
    found = [
        agrees(settings_of(loss=loss, kl=IN_LOSS[2], **masks), without_truncated(rollouts), advantages, logps)
        for masks in ({}, *({name: value} for name, value in masked.items()), masked)
    ]
    assert len(set(found)) == 4  # each leaves out something
