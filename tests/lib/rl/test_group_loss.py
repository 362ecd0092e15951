"""The loss of an optimizer step: its denominators over micro-batches, what its masks leave out, and the KL beside."""

from typing import Any

import pytest
import torch

from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.group_loss import step_loss
from stages.lib.rl.kl_control import kl_loss
from stages.lib.rl.learner import Pass
from stages.lib.rl.policy_losses import policy_terms
from stages.lib.rl.rollouts import Rollouts
from stages.lib.rl.token_masks import highest_entropy, without_truncated
from stages.lib.settings.declaration import block
from stages.lib.settings.kl_penalty import KlInLoss, KlInReward, NoKl
from stages.lib.settings.policy_loss import DapoLoss, DrGrpoLoss, GrpoLoss
from stages.lib.settings.train_grpo import TrainGrpo
from tests.lib.rl.test_rollouts import read
from tests.tiny_models import batching, tiny_llama

KL_COEF = 0.5
ADVANTAGES = torch.tensor([[2.0], [-1.0], [0.5]])


def entry(**changed: Any) -> TrainGrpo:
    return TrainGrpo.model_validate(block(TrainGrpo, **({"kl": block(NoKl), "held_out": None} | changed)))


def sums_of(settings: TrainGrpo, rollouts: Rollouts, budget: int = 1000) -> dict[str, float]:
    """The sums over all passes of a step, made as a `Learner` makes them; "gradient" is that of the loss."""
    module = TokenLogProbs(tiny_llama(5))
    advantages = torch.where(read(1000, packing=False).response_mask, ADVANTAGES, 0.0)
    loss = step_loss(settings, KL_COEF, rollouts, advantages, [0, 1, 2])
    totals: dict[str, float] = {}
    for batch in batching(budget).sequences(rollouts.prompts, rollouts.responses):
        sums = loss(rollouts, Pass(module, batch, batch.rows))
        sums["loss"].backward()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach())
    weights = [weight.grad for weight in module.parameters() if weight.grad is not None]
    return totals | {"gradient": float(torch.cat([grad.flatten() for grad in weights]).norm())}


def logps_of(rollouts: Rollouts) -> torch.Tensor:
    """Of the same policy, each token alone."""
    found, model = torch.zeros_like(rollouts.logps), tiny_llama(5)
    for row, (prompt, response) in enumerate(zip(rollouts.prompts, rollouts.responses, strict=True)):
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0], dim=-1)
        for t, token in enumerate(response):
            found[row, t] = log_probs[len(prompt) - 1 + t, token]
    return found


@pytest.mark.parametrize("model", [GrpoLoss, DapoLoss, DrGrpoLoss])
def test_the_denominators_do_not_depend_on_micro_batches(model: type) -> None:
    """Lengths 2, 4 and 1, so 3 responses and 7 tokens, of which a micro-batch sees some."""
    rollouts, settings = read(1000, packing=False), entry(loss=block(model), max_new_tokens=10)
    losses = policy_terms(
        logps_of(rollouts), rollouts.logps, ADVANTAGES.expand(3, 4), rollouts.response_mask, settings.loss
    ).losses.sum(dim=-1)
    lengths = torch.tensor([2.0, 4.0, 1.0])
    wanted = {"grpo": (losses / lengths).mean(), "dr_grpo": losses.sum() / 30}
    together, apart = sums_of(settings, rollouts), sums_of(settings, rollouts, budget=1)
    mean = float(wanted.get(settings.loss.type, losses.sum() / 7))
    assert together["loss"] / 7 == pytest.approx(mean, rel=1e-4)
    for name, value in together.items():
        assert apart[name] == pytest.approx(value, rel=1e-4), name


def test_a_truncated_response_is_as_though_it_were_not_there() -> None:
    rollouts = read(1000, packing=False)
    counted = without_truncated(rollouts)
    settings = entry(loss=block(GrpoLoss))
    losses = policy_terms(
        logps_of(rollouts), rollouts.logps, ADVANTAGES.expand(3, 4), counted.response_mask, settings.loss
    ).losses.sum(dim=-1)
    mean = float((losses[0] / 2 + losses[1] / 4) / 2)
    assert sums_of(settings, counted)["loss"] / 6 == pytest.approx(mean, rel=1e-4)


def test_the_entropy_mask_leaves_denominators_and_kl_as_they_are() -> None:
    rollouts, kl = read(1000, packing=False), block(KlInLoss, estimator="k3")
    settings = entry(top_entropy_share=0.4, kl=kl)
    kept = highest_entropy(rollouts.entropies, rollouts.response_mask, 0.4)
    assert 0 < int(kept.sum()) < 7
    terms = policy_terms(
        logps_of(rollouts), rollouts.logps, ADVANTAGES.expand(3, 4), rollouts.response_mask, settings.loss
    )
    others = logps_of(rollouts), rollouts.logps, rollouts.reference_logps, rollouts.response_mask
    assert isinstance(settings.kl, KlInLoss)
    divergence = float(kl_loss(*others, settings.kl).sum())
    found = sums_of(settings, rollouts)
    assert found["loss"] == pytest.approx(float(terms.losses[kept].sum()) + KL_COEF * divergence, rel=1e-4)
    assert found["kl"] == pytest.approx(divergence, rel=1e-4)


def test_bad_responses_that_the_policy_has_left_behind_are_counted_and_left_out() -> None:
    rollouts = read(1000, packing=False)
    fallen = (rollouts.logps - logps_of(rollouts)).sum(dim=-1) / torch.tensor([2, 4, 1])
    rollouts = rollouts._replace(logps=rollouts.logps + torch.where(rollouts.response_mask, 1 - fallen[:, None], 0.0))
    terms = policy_terms(
        logps_of(rollouts), rollouts.logps, ADVANTAGES.expand(3, 4), rollouts.response_mask, entry().loss
    )
    left_out = sums_of(entry(off_policy_limit=0.9), rollouts)
    assert left_out["left_out"] == 4  # the second response, the bad one, has fallen by 1 nat a token
    assert left_out["loss"] == pytest.approx(float(terms.losses[[0, 2]].sum()), rel=1e-4)
    kept = sums_of(entry(off_policy_limit=1.1), rollouts)
    assert (kept["left_out"], kept["loss"]) == (0, pytest.approx(float(terms.losses.sum()), rel=1e-4))


def test_a_kl_in_the_reward_is_measured_and_gives_no_gradient() -> None:
    rollouts = read(1000, packing=False)
    of_reward, nothing = sums_of(entry(kl=block(KlInReward)), rollouts), sums_of(entry(), rollouts)
    assert of_reward["kl"] > 0
    assert of_reward["loss"] == nothing["loss"]
    assert of_reward["gradient"] == nothing["gradient"]
    assert "kl" not in sums_of(entry(), rollouts._replace(reference_logps=None))


def test_a_step_without_any_token_has_no_loss() -> None:
    rollouts = read(1000, packing=False)
    nothing = rollouts._replace(response_mask=torch.zeros_like(rollouts.response_mask))
    found = sums_of(entry(kl=block(KlInLoss)), nothing)
    assert (found["loss"], found["gradient"]) == (0, 0)
