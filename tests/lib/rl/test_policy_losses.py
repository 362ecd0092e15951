import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter

from stages.lib.rl.policy_losses import MEANS, POLICY_LOSSES, PolicyTerms, policy_terms, token_weights
from stages.lib.settings.declaration import block
from stages.lib.settings.policy_loss import ClipLoss, PolicyLoss

NAN = math.nan
UNION, _ = get_args(PolicyLoss)
MODELS = (*get_args(UNION), ClipLoss)
CLASSES = {get_args(model.model_fields["type"].annotation)[0]: model for model in MODELS}


def settings_of(kind: str, **changed: Any) -> Any:
    """A block with its defaults, but for what is changed."""
    return CLASSES[kind].model_validate(block(CLASSES[kind], **changed))


CLIP = settings_of("clip")


def clip_loss(*tensors: torch.Tensor) -> PolicyTerms:
    return policy_terms(*tensors, CLIP)


def test_policy_loss_by_hand():
    # e = 0.2; five tokens that count, one that does not:
    #   ratio 1.5, A  2: min( 3.0,  2.4) =  2.4 clipped        k3: 0.5 - ln 1.5  = 0.094535
    #   ratio 1.5, A -1: min(-1.5, -1.2) = -1.5 not clipped    k3:                 0.094535
    #   ratio 0.5, A  2: min( 1.0,  1.6) =  1.0 not clipped    k3: -0.5 - ln 0.5 = 0.193147
    #   ratio 0.5, A -1: min(-0.5, -0.8) = -0.8 clipped        k3:                 0.193147
    #   ratio 1.1, A  3: 3.3 inside the range                  k3: 0.1 - ln 1.1  = 0.004690
    # loss -(2.4 - 1.5 + 1.0 - 0.8 + 3.3) = -4.4, k3 0.580054. Reversed, log(old / new), k3 would sum to 0.618.
    old_logps = torch.tensor([[-2.0, -1.0, -3.0], [-1.0, -0.5, -1.0]])
    ratios = torch.tensor([[1.5, 1.5, 0.5], [0.5, 1.1, 4.0]])
    terms = clip_loss(
        old_logps + ratios.log(),
        old_logps,
        torch.tensor([[2.0, -1.0, 2.0], [-1.0, 3.0, 50.0]]),
        torch.tensor([[True, True, True], [True, True, False]]),
    )
    assert terms.losses.sum().item() == pytest.approx(-4.4, abs=1e-5)
    assert terms.clipped.tolist() == [[1, 0, 0], [1, 0, 0]]
    assert terms.approx_kl.sum().item() == pytest.approx(0.580054, abs=1e-5)


def test_policy_gradient_by_hand():
    # d/dlogp of -ratio A is -ratio A where the plain branch is the loss, 0 where the clipped one is (tokens as above).
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]], dtype=torch.float64)
    advantages = torch.tensor([[2.0, -1.0, 2.0, -1.0, 3.0]], dtype=torch.float64)
    logps = ratios.log().requires_grad_()
    terms = clip_loss(logps, torch.zeros_like(ratios), advantages, torch.ones(1, 5, dtype=torch.bool))
    terms.losses.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[0.0, 1.5, -1.0, 0.0, -3.3]], dtype=torch.float64))


def test_policy_gradient_is_the_numerical_one():
    generator = torch.Generator().manual_seed(0)
    logps, old_logps, advantages = (
        torch.randn(3, 4, dtype=torch.float64, generator=generator) * scale for scale in (0.3, 0.3, 1.0)
    )
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    assert torch.autograd.gradcheck(
        lambda x: clip_loss(x, old_logps, advantages, mask).losses.sum(), logps.requires_grad_()
    )


def test_on_the_first_minibatch_the_loss_is_minus_the_mean_advantage():
    generator = torch.Generator().manual_seed(0)
    logps, advantages = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    current = logps.clone().requires_grad_()
    terms = clip_loss(current, logps, advantages, mask)
    loss = terms.losses.sum() / mask.sum()
    loss.backward()
    assert loss.item() == pytest.approx(-advantages[mask].mean().item(), rel=1e-6)
    assert terms.clipped.sum().item() == 0
    assert terms.approx_kl.sum().item() == 0
    # The whole policy gradient, not half of it, though both branches are equal here.
    torch.testing.assert_close(current.grad, torch.where(mask, -advantages / mask.sum(), 0.0))


@pytest.mark.parametrize("garbage", [1e4, -1e4, NAN, math.inf])
def test_masked_positions_change_neither_policy_loss_nor_gradient(garbage):
    mask = torch.tensor([[True, False]])
    logps = torch.tensor([[-1.0, garbage]], requires_grad=True)
    terms = clip_loss(logps, torch.tensor([[-1.1, -1.0]]), torch.tensor([[2.0, garbage]]), mask)
    terms.losses.sum().backward()
    assert terms.losses.sum().item() == pytest.approx(-2 * math.exp(0.1))
    assert terms.approx_kl.sum().item() == pytest.approx(math.exp(0.1) - 1.1, abs=1e-6)
    torch.testing.assert_close(logps.grad, torch.tensor([[-2 * math.exp(0.1), 0.0]]))


def test_only_the_current_network_gets_a_gradient():
    tensors = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    terms = clip_loss(*tensors, torch.ones(2, 3, dtype=torch.bool))
    terms.losses.sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [False, True, True]
    assert [value.requires_grad for value in terms] == [True] + [False] * (len(terms) - 1)


def policy_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log pi, log pi_old, an advantage at each token of a response, and the mask of lengths 4, 2 and 1."""
    generator = torch.Generator().manual_seed(seed)
    old_logps = -torch.rand(3, 4, dtype=torch.float64, generator=generator) * 2 - 0.1
    logps = old_logps + 0.5 * torch.randn(3, 4, dtype=torch.float64, generator=generator)
    advantages = torch.tensor([[1.5], [-0.7], [2.0]], dtype=torch.float64).expand(3, 4)
    return logps, old_logps, advantages, torch.arange(4) < torch.tensor([[4], [2], [1]])


def clipped(ratio: float, advantage: float, low: float, high: float, most: float = math.inf) -> float:
    return -min(min(ratio, most) * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def sapo(ratio: float, advantage: float) -> float:
    tau = 1.0 if advantage > 0 else 1.05
    return -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage


def vespo(ratios: list[float], advantage: float, logp: float) -> float:
    k, decay = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
    product = math.prod(ratios)
    return -(product**k) * math.exp(decay * (1 - product)) * advantage * logp


# The loss of a token by its paper, from the response's ratios, the token's place, A and log pi.
BY_PAPER: dict[str, Callable[[list[float], int, float, float], float]] = {
    "clip": lambda r, t, a, _: clipped(r[t], a, 0.2, 0.2),
    "grpo": lambda r, t, a, _: clipped(r[t], a, 0.2, 0.2),
    "bnpo": lambda r, t, a, _: clipped(r[t], a, 0.2, 0.2),
    "dr_grpo": lambda r, t, a, _: clipped(r[t], a, 0.2, 0.2),
    "dapo": lambda r, t, a, _: clipped(r[t], a, 0.2, 0.28),
    "gspo": lambda r, _, a, __: clipped(math.prod(r) ** (1 / len(r)), a, 3e-4, 4e-4),
    "gspo_token": lambda r, _, a, __: clipped(math.prod(r) ** (1 / len(r)), a, 3e-4, 4e-4),
    "luspo": lambda r, _, a, __: clipped(math.prod(r) ** (1 / len(r)), a, 3e-4, 4e-4),
    "cispo": lambda r, t, a, logp: -min(r[t], 5.0) * a * logp,
    "sapo": lambda r, t, a, _: sapo(r[t], a),
    "vespo": lambda r, _, a, logp: vespo(r, a, logp),
}


def test_each_loss_has_its_settings_and_its_mean() -> None:
    assert {*POLICY_LOSSES} == {*MEANS} == {*CLASSES} == {*BY_PAPER}
    chosen = TypeAdapter(PolicyLoss).validate_python(block(CLASSES["gspo"]))
    assert (chosen.low, chosen.high) == (3e-4, 4e-4)


@pytest.mark.parametrize("kind", BY_PAPER)
def test_the_loss_of_each_token_is_that_of_its_paper(kind: str) -> None:
    logps, old_logps, advantages, mask = policy_batch()
    losses = policy_terms(logps, old_logps, advantages, mask, settings_of(kind)).losses
    for row, length in enumerate((4, 2, 1)):
        ratios = (logps - old_logps).exp()[row, :length].tolist()
        for t in range(length):
            wanted = BY_PAPER[kind](ratios, t, float(advantages[row, t]), float(logps[row, t]))
            assert losses[row, t].item() == pytest.approx(wanted, rel=1e-9)
        assert not losses[row, length:].any()


@pytest.mark.parametrize("kind", BY_PAPER)
def test_at_the_sampling_policy_every_gradient_is_the_policy_gradient(kind: str) -> None:
    """-A d log pi at each token; GSPO's mean ratio spreads a response's tokens over each other, which adds up."""
    _, old_logps, advantages, mask = policy_batch()
    logps = old_logps.clone().requires_grad_()
    policy_terms(logps, old_logps, advantages, mask, settings_of(kind)).losses.sum().backward()
    torch.testing.assert_close(logps.grad, torch.where(mask, -advantages, 0.0))


def test_gspo_token_gives_each_token_its_own_advantage() -> None:
    _, old_logps, _, mask = policy_batch()
    advantages = torch.arange(12, dtype=torch.float64).reshape(3, 4) + 1
    gradients = {}
    for kind in ("gspo", "gspo_token"):
        logps = old_logps.clone().requires_grad_()
        policy_terms(logps, old_logps, advantages, mask, settings_of(kind)).losses.sum().backward()
        gradients[kind] = logps.grad
    torch.testing.assert_close(gradients["gspo_token"], torch.where(mask, -advantages, 0.0))
    assert gradients["gspo"][0].tolist() == pytest.approx([-2.5] * 4)  # the mean of 1, 2, 3 and 4


def test_the_ratio_of_grpo_may_be_that_of_the_response() -> None:
    batch = policy_batch()
    range_of_gspo = {"low": 3e-4, "high": 4e-4}
    sequence = policy_terms(*batch, settings_of("grpo", ratio="sequence", **range_of_gspo))
    assert torch.equal(sequence.losses, policy_terms(*batch, settings_of("gspo")).losses)
    assert not torch.equal(sequence.losses, policy_terms(*batch, settings_of("grpo", **range_of_gspo)).losses)


def test_a_dual_clip_bounds_what_a_negative_advantage_does() -> None:
    # ratio 4, A -1: min(4, 3) = 3 instead of 4, without gradient; A 1: clipped at 1.2 as ever; ratio 2, A -1: as ever.
    logps = torch.tensor([[4.0, 4.0, 2.0]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[-1.0, 1.0, -1.0]], dtype=torch.float64)
    nothing, mask = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    terms = policy_terms(logps, nothing, advantages, mask, settings_of("clip", dual_clip=3.0))
    terms.losses.sum().backward()
    assert terms.losses[0].tolist() == pytest.approx([3.0, -1.2, 2.0])
    assert terms.clipped[0].tolist() == [1, 1, 0]
    assert logps.grad[0].tolist() == pytest.approx([0.0, 0.0, 2.0])


def test_a_dual_clip_inside_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dual_clip \(1.1\) must be above 1 \+ high \(1.2\)"):
        settings_of("grpo", dual_clip=1.1)


def test_the_denominators_are_those_of_the_whole_step() -> None:
    """Losses 1, 2, 3, 4 and 10, 20 of two responses, and one that is left out; max_new_tokens 5."""
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 0.0, 0.0], [0.0] * 4])
    lengths = torch.tensor([4, 2, 0])
    wanted = {
        "dapo": 40 / 6,
        "bnpo": 40 / 6,
        "clip": 40 / 6,
        "cispo": 40 / 6,
        "vespo": 40 / 6,
        "grpo": (2.5 + 15) / 2,
        "gspo": (2.5 + 15) / 2,
        "gspo_token": (2.5 + 15) / 2,
        "sapo": (2.5 + 15) / 2,
        "dr_grpo": 40 / (2 * 5),
        "luspo": 40 / 2,
    }
    for kind in MEANS:
        weights = token_weights(kind, lengths, max_new_tokens=5)
        assert float((losses * weights[:, None]).sum() / 6) == pytest.approx(wanted[kind])
        assert token_weights(kind, torch.tensor([0, 0]), max_new_tokens=5).isfinite().all()
