"""The entropy in the policy's loss: its coefficient, and that it has a gradient."""

import pytest
import torch

from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.entropy_bonus import EntropyCoefficient
from stages.lib.settings.declaration import block
from stages.lib.settings.entropy_bonus import AdaptiveEntropyBonus, FixedEntropyBonus, NoEntropyBonus
from tests.tiny_models import batching, tiny_llama


def test_an_adaptive_coefficient_by_hand() -> None:
    coefficient = EntropyCoefficient(AdaptiveEntropyBonus(**block(AdaptiveEntropyBonus, target=0.5, step=0.1)))
    used = []
    for entropy in (0.4, 0.4, 0.6, 0.6, 0.6, 0.5):
        used.append(coefficient.of_phase(entropy))
        coefficient.update(entropy)
    # c is 0, 0.1, 0.2, 0.1, 0, 0: never below 0, and without effect above the target
    assert used == pytest.approx([0.0, 0.1, 0.0, 0.0, 0.0, 0.0])
    assert coefficient.coef == 0


def test_a_fixed_coefficient_stays_and_none_is_0() -> None:
    for settings, expected in (
        (FixedEntropyBonus(**block(FixedEntropyBonus, coef=0.02)), 0.02),
        (NoEntropyBonus(**block(NoEntropyBonus)), 0.0),
    ):
        coefficient = EntropyCoefficient(settings)
        coefficient.update(9.0)
        assert coefficient.of_phase(9.0) == expected


def test_a_restored_coefficient_goes_on_as_the_first_would() -> None:
    settings = AdaptiveEntropyBonus(**block(AdaptiveEntropyBonus, target=0.5, step=0.1))
    first, second = EntropyCoefficient(settings), EntropyCoefficient(settings)
    first.update(0.1)
    second.load_state_dict(first.state_dict())
    assert second.of_phase(0.1) == first.of_phase(0.1) == 0.1


def test_entropies_have_a_gradient_where_a_loss_holds_them() -> None:
    (batch,) = batching(1000).sequences([[3, 4]], [[9, 10, 1]])
    for chunk in (4096, 2):
        model = tiny_llama(1)
        module = TokenLogProbs(model, chunk_tokens=chunk, with_entropies=True, entropy_gradient=True)
        found = module(*batch.inputs, batch.completion_mask, 0.7).entropies.sum()
        logits = model(torch.tensor([[3, 4, 9, 10, 1]])).logits[0, 1:4] / 0.7
        wanted = torch.distributions.Categorical(logits=logits).entropy().sum()
        gradients = [torch.autograd.grad(value, model.lm_head.weight)[0] for value in (found, wanted)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    without = TokenLogProbs(tiny_llama(1), with_entropies=True)
    assert without(*batch.inputs, batch.completion_mask, 0.7).entropies.count_nonzero() == 0
