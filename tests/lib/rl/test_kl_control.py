import math

import pytest
import torch

from stages.lib.rl.kl_control import AdaptiveKLController, FixedKLController, kl_estimate, kl_loss
from stages.lib.settings.declaration import block
from stages.lib.settings.kl_penalty import KlInLoss


def test_estimates_by_hand():
    # d = -1 - -1.5 = 0.5: k1 0.5, k2 0.125, k3 e^-0.5 - 1 + 0.5 = 0.106531 (with the sign of d wrong: 0.148721)
    logps, reference = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    assert kl_estimate(logps, reference).item() == 0.5
    assert kl_estimate(logps, reference, "k2").item() == 0.125
    assert kl_estimate(logps, reference, "k3").item() == pytest.approx(0.106531, abs=1e-6)


def test_expectations_of_the_estimates():
    # policy (.5, .3, .2), reference (.2, .3, .5): KL = .5 ln 2.5 + .2 ln .4 = .3 ln 2.5 = 0.274887;
    # E[k2] = (.5 + .2) ln(2.5)^2 / 2 = 0.293856, biased.
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    expectation = {
        kind: (policy * kl_estimate(policy.log(), reference.log(), kind)).sum().item() for kind in ("k1", "k2", "k3")
    }
    assert expectation["k1"] == pytest.approx(0.3 * math.log(2.5))
    assert expectation["k3"] == pytest.approx(0.3 * math.log(2.5))
    assert expectation["k2"] == pytest.approx(0.293856, abs=1e-6)


def test_a_policy_equal_to_its_reference_has_no_kl():
    logps = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for kind in ("k1", "k2", "k3"):
        assert not kl_estimate(logps, logps, kind).any()
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(logps, logps, "k4")


# The policy that is trained, the one that sampled, the reference; over three tokens, of which one is a response.
POLICY, SAMPLED_BY, REFERENCE = (0.5, 0.3, 0.2), (0.3, 0.3, 0.4), (0.2, 0.3, 0.5)


def mean_gradient(estimator: str, sampled_by: tuple, *, bias_correction: bool) -> torch.Tensor:
    """Of the loss of responses of one token, over all that a policy may sample, with respect to the logits."""
    logits = torch.tensor(POLICY, dtype=torch.float64).log().requires_grad_()
    old, reference = (torch.tensor(p, dtype=torch.float64).log() for p in (sampled_by, REFERENCE))
    settings = KlInLoss(**block(KlInLoss, estimator=estimator, bias_correction=bias_correction))
    columns = (logits.log_softmax(0)[:, None], old[:, None], reference[:, None])
    each = kl_loss(*columns, torch.ones(3, 1, dtype=torch.bool), settings)
    (old.exp() @ each).sum().backward()
    assert logits.grad is not None
    return logits.grad


def gradient_of_kl(*, forward: bool) -> torch.Tensor:
    """By hand: of KL(policy || reference) π (d − KL); of KL(reference || policy), which is `forward`, π − π_ref."""
    policy, reference = (torch.tensor(p, dtype=torch.float64) for p in (POLICY, REFERENCE))
    difference = policy.log() - reference.log()
    return policy - reference if forward else policy * (difference - policy @ difference)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradients_of_the_loss_are_those_of_a_kl(estimator: str) -> None:
    own = mean_gradient(estimator, POLICY, bias_correction=False)
    assert torch.allclose(own, gradient_of_kl(forward=estimator == "k3"), atol=1e-12)
    # On an earlier policy's tokens that holds with the correction alone, and k3's turns into the other KL's.
    corrected = mean_gradient(estimator, SAMPLED_BY, bias_correction=True)
    assert torch.allclose(corrected, gradient_of_kl(forward=False), atol=1e-12)
    plain = mean_gradient(estimator, SAMPLED_BY, bias_correction=False)
    assert all(not torch.allclose(plain, gradient_of_kl(forward=which), atol=0.02) for which in (True, False))


@pytest.mark.parametrize("bias_correction", [True, False])
def test_what_is_no_response_has_no_part_in_the_loss(bias_correction: bool) -> None:
    logps = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    others = torch.tensor([[-1.5, math.inf]])
    settings = KlInLoss(**block(KlInLoss, estimator="k3", bias_correction=bias_correction))
    each = kl_loss(logps, others, others, torch.tensor([[True, False]]), settings)
    each.sum().backward()
    assert each[0, 1] == 0
    assert torch.isfinite(each).all()
    assert logps.grad is not None
    assert logps.grad[0, 1] == 0


def test_k1_is_refused_as_a_loss() -> None:
    with pytest.raises(ValueError, match="k1 in the loss has a gradient of mean 0"):
        KlInLoss(**block(KlInLoss, estimator="k1"))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.6, 0.100256),  # error 0.1:        0.1 * (1 + 0.1 * 256 / 10000)
        (6.0, 0.1),  # on target
        (60.0, 0.100512),  # error 9, held at 0.2
        (0.0, 0.099488),  # error -1, held at -0.2
        (-3.0, 0.099488),  # k1 may be negative
    ],
)
def test_adaptive_controller_by_hand(kl, expected):
    controller = AdaptiveKLController(0.1, target=6.0, horizon=10_000)
    controller.update(kl, samples=256)
    assert controller.coef == pytest.approx(expected, rel=1e-12)


def test_updates_compound():
    controller = AdaptiveKLController(0.5, target=2.0, horizon=100)
    controller.update(2.2, samples=10)  # * (1 + 0.1 * 0.1) = 1.01
    controller.update(1.8, samples=20)  # * (1 - 0.1 * 0.2) = 0.98
    assert controller.coef == pytest.approx(0.5 * 1.01 * 0.98, rel=1e-12)


def test_a_restored_controller_goes_on_as_the_first_would():
    first = AdaptiveKLController(0.5, target=2.0, horizon=100)
    first.update(5.0, samples=10)
    second = AdaptiveKLController(0.5, target=2.0, horizon=100)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.update(1.0, samples=10)
    assert first.coef == second.coef
    assert first.coef != 0.5


def test_fixed_controller_stays():
    controller = FixedKLController(0.05)
    controller.update(100.0, samples=512)
    assert controller.coef == 0.05
    other = FixedKLController(0.0)
    other.load_state_dict(controller.state_dict())
    assert other.coef == 0.05


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((0.1, 0.0, 100), "target"),
        ((0.1, -1.0, 100), "target"),
        ((0.1, math.nan, 100), "target"),
        ((0.1, 6.0, 0), "horizon"),
        ((0.1, 6.0, -5), "horizon"),
        ((0.0, 6.0, 100), "above 0"),
        ((-0.1, 6.0, 100), "negative"),
    ],
)
def test_senseless_controllers_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        AdaptiveKLController(*arguments)


def test_a_negative_fixed_coefficient_is_refused():
    with pytest.raises(ValueError, match="negative"):
        FixedKLController(-0.1)


@pytest.mark.parametrize(
    ("kl", "samples", "complaint"), [(math.nan, 10, "nan"), (math.inf, 10, "inf"), (0.0, 500, "horizon")]
)
def test_an_update_that_would_break_the_coefficient_is_refused(kl, samples, complaint):
    # NaN passes through min and max unseen; 500 samples on a horizon of 100 would make it 0.1 * (1 - 0.2 * 5) = 0.
    controller = AdaptiveKLController(0.1, target=6.0, horizon=100)
    with pytest.raises(ValueError, match=complaint):
        controller.update(kl, samples)
    assert controller.coef == 0.1
