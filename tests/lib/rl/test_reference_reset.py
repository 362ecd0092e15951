"""A reference that becomes the policy: when, with which weights, and that a checkpoint holds it."""

import pytest
import torch

from stages.lib.compute.engine.torch import TorchEngine
from stages.lib.compute.processes import Processes
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.reference_reset import ResetReference
from stages.lib.settings.reference_reset import ReferenceReset
from tests.lib.rl.test_learner import OPTIMIZER, PLAIN_TORCH
from tests.tiny_models import CPU, tiny_llama


def reset_every(phases: int | None, *, tied: bool = False) -> ResetReference:
    policy, reference = tiny_llama(1), tiny_llama(2)
    if tied:
        for model in (policy, reference):
            model.lm_head.weight = model.model.embed_tokens.weight
    engine = TorchEngine(TokenLogProbs(policy), OPTIMIZER, 8, PLAIN_TORCH, Processes(0, 1, CPU))
    settings = None if phases is None else ReferenceReset(every=phases)
    return ResetReference(settings, TokenLogProbs(reference), engine, policy)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def held(reset: ResetReference) -> torch.Tensor:
    assert isinstance(reset.reference, TokenLogProbs)
    return weights(reset.reference)


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_policy_after_the_phases_that_are_due(tied: bool) -> None:
    reset = reset_every(2, tied=tied)
    first = held(reset)
    assert not reset.after_phase(0)
    assert torch.equal(held(reset), first)
    assert reset.after_phase(1)
    assert torch.equal(held(reset), weights(reset.policy_model))
    with torch.no_grad():
        reset.policy_model.lm_head.weight.add_(1.0)  # it is a copy
    assert not torch.equal(held(reset), weights(reset.policy_model))


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_holds_it_once_it_was_reset(tied: bool) -> None:
    first, second = reset_every(1, tied=tied), reset_every(1, tied=tied)
    assert [*first.tensors()] == []
    first.after_phase(0)
    saved = {name: tensor.clone() for name, tensor in first.tensors()}
    assert len({tensor.data_ptr() for _, tensor in first.tensors()}) == len(saved)  # tied weights once
    second.load_state_dict(first.state_dict(), saved.__getitem__)
    assert torch.equal(held(first), held(second))
    assert [name for name, _ in second.tensors()] == [*saved]


def test_without_settings_it_stays() -> None:
    reset = reset_every(None)
    first = held(reset)
    assert not reset.after_phase(0)
    assert torch.equal(held(reset), first)
