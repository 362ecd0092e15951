"""Losses on pairs, against values worked out by hand, a second implementation in 150 digits, and what holds for all."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from mpmath import mpf
from pydantic import TypeAdapter, ValidationError

from stages.lib.objectives.divergences import scores
from stages.lib.objectives.preference_losses import (
    PREFERENCE_LOSSES,
    PairBatch,
    StepTies,
    clamped_shares,
    implicit_rewards,
    robust,
    sigmoid,
)
from stages.lib.objectives.step_ties import RunningMean, ties_of_step
from stages.lib.settings import preference_loss as of
from stages.lib.settings.declaration import block
from stages.lib.settings.divergence import AlphaDivergence, AnyDivergence, ForwardKl, JensenShannon, ReverseKl
from tests.lib.objectives.losses_by_paper import BY_PAPER, Numbers, gradient, score
from tests.real_files import PROJECT

SINGLE = get_args(get_args(of.PairLoss)[0])
GAPS = tuple(kind for kind in SINGLE if issubclass(kind, of.ScoreGapLoss))


def settings_of(kind: type, **changed: Any) -> Any:
    """A loss with its defaults, but for what is changed."""
    return TypeAdapter(kind).validate_python(block(kind, **changed))


DIVERGENCES: tuple[AnyDivergence, ...] = (
    settings_of(ReverseKl),
    settings_of(ForwardKl),
    settings_of(JensenShannon),
    settings_of(AlphaDivergence, alpha=0.3),
    settings_of(AlphaDivergence, alpha=1.0),
)
EACH = (
    *map(settings_of, SINGLE),
    *(settings_of(kind, divergence=own.model_dump()) for kind in GAPS for own in DIVERGENCES[1:]),
    settings_of(of.SigmoidLoss, beta=0.3, label_smoothing=0.2),
    settings_of(of.RobustLoss, beta=0.3, flip_rate=0.4),
    settings_of(of.ExoPairLoss, beta=0.5, label_smoothing=0.2),
    settings_of(of.IpoLoss, over_tokens="sum"),
    settings_of(of.IpoLoss, over_tokens="sum", divergence=block(ForwardKl)),
    settings_of(of.AotLoss, label_smoothing=0.1),
    settings_of(of.AotUnpairedLoss, label_smoothing=0.1),
    settings_of(of.SppoHardLoss, beta=0.1),
    settings_of(of.DiscopopLoss, beta=2.0, blend_temperature=1.0),
)


def named(settings: Any) -> str:
    changed = [
        f"{name}={value}" for name, value in settings.model_dump().items() if value != block(type(settings))[name]
    ]
    return f"{settings.type}({', '.join(changed)})"


each_loss = pytest.mark.parametrize("settings", EACH, ids=named)


def pairs_of(deltas: list[tuple[float, float]], dtype: torch.dtype = torch.float64) -> PairBatch:
    """Pairs with these log-ratios, of log-probs around −150."""
    generator = torch.Generator().manual_seed(1)
    columns = torch.tensor(deltas, dtype=torch.float64).unbind(dim=1)
    reference = [-150 + 8 * torch.randn(len(deltas), dtype=torch.float64, generator=generator) for _ in columns]
    logps = [*(delta + own for delta, own in zip(columns, reference, strict=True)), *reference]
    lengths = torch.randint(1, 12, (2, len(deltas)), generator=generator)
    return PairBatch(*(own.to(dtype) for own in logps), *lengths)


def random_pairs(pairs: int = 6, dtype: torch.dtype = torch.float64) -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    return pairs_of((4 * torch.randn(pairs, 2, dtype=torch.float64, generator=generator)).tolist(), dtype)


def extreme_pairs(dtype: torch.dtype = torch.float64) -> PairBatch:
    """Log-ratios around ±100, of one reply and of both, no two alike: a sort has no slope at a tie."""
    pairs = pairs_of([(-100.0, -101.0), (-102.0, 100.0), (101.0, -103.0), (102.0, 103.0), (0.01, -104.0)], dtype)
    # One more with replies of probability 1, whose odds are infinite, and of one token as good as impossible.
    ends = torch.tensor([[-1e-30], [-250.0], [-100.0], [-150.0]], dtype=dtype)
    logps = [torch.cat([own, end]) for own, end in zip(pairs[:4], ends, strict=True)]
    return PairBatch(*logps, *(torch.cat([own, torch.tensor([1])]) for own in pairs[4:6]))


def tied(pairs: PairBatch, settings: Any) -> PairBatch:
    """As the pairs of a whole step."""
    ties = StepTies(mean_chosen_length=float(pairs.chosen_lengths.double().mean()))
    detached = PairBatch(*(own.detach() for own in pairs[:6]), ties)
    return pairs._replace(ties=ties_of_step(detached, settings, RunningMean(), train=True))


def numbers_of(pairs: PairBatch) -> Numbers:
    logps = [[mpf(value) for value in own.tolist()] for own in pairs[:4]]
    return Numbers(*logps, *(own.tolist() for own in pairs[4:6]), mpf(pairs.ties.shift))


def value_and_gradient(pairs: PairBatch, settings: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses of all pairs, and ∂(their sum)/∂ log π of the chosen and of the rejected replies."""
    policy = [own.clone().requires_grad_() for own in pairs[:2]]
    losses = PREFERENCE_LOSSES[settings.type](tied(PairBatch(*policy, *pairs[2:]), settings), settings)
    gradients = torch.autograd.grad(losses.sum(), policy, allow_unused=True, materialize_grads=True)
    return losses.detach(), *gradients


@each_loss
@pytest.mark.parametrize("make", [random_pairs, extreme_pairs])
def test_a_loss_and_its_gradient_are_those_of_the_paper(settings: Any, make: Callable[[], PairBatch]) -> None:
    pairs = make()
    losses, *gradients = value_and_gradient(pairs, settings)
    numbers = numbers_of(tied(pairs, settings))
    assert float(losses.sum()) == pytest.approx(float(BY_PAPER[settings.type](numbers, settings)), rel=1e-9)
    for found, wanted in zip(gradients, gradient(numbers, settings), strict=True):
        tolerance = max(1e-12, 1e-9 * max(abs(float(own)) for own in wanted))
        assert found.tolist() == pytest.approx([float(own) for own in wanted], rel=1e-6, abs=tolerance)


@each_loss
def test_float32_stays_finite_at_any_log_ratio(settings: Any) -> None:
    for found in value_and_gradient(extreme_pairs(torch.float32), settings):
        assert torch.isfinite(found).all()


FIRST_VALUES: dict[str, Callable[[Any], float]] = {
    **dict.fromkeys(("sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"), lambda _: math.log(2)),
    **dict.fromkeys(("bco_pair", "nca_pair"), lambda _: 2 * math.log(2)),
    **dict.fromkeys(("hinge", "apo_zero", "apo_down"), lambda _: 1.0),
    "exo_pair": lambda own: -math.log(2) - math.log(own.label_smoothing * (1 - own.label_smoothing)) / 2,
    "ipo": lambda own: 1 / (4 * own.beta**2),
    "sppo_hard": lambda own: 1 / (2 * own.beta**2),
    "discopop": lambda _: math.log(2) / 2 + 0.5,
}


@pytest.mark.parametrize("settings", [own for own in EACH if of.reads_reference(own)], ids=named)
def test_a_policy_that_is_its_reference_has_the_first_value(settings: Any) -> None:
    chosen, rejected, _, _, *others = random_pairs()
    pairs = tied(PairBatch(chosen, rejected, chosen, rejected, *others), settings)
    losses = PREFERENCE_LOSSES[settings.type](pairs, settings)
    assert losses.tolist() == pytest.approx([FIRST_VALUES[settings.type](settings)] * 6)
    assert not any(rewards.any() for rewards in implicit_rewards(pairs, 0.7))


def test_sigmoid_by_hand() -> None:
    # Δ_c = -10 - -12 = 2, Δ_r = -11 - -10 = -1, h = 3, β h = 0.3: log(1 + e^-0.3) = 0.554355
    # Summing where it should subtract (h = 1) gives 0.644397; swapping policy and reference (h = -3) 0.854355.
    assert sigmoid(one_pair(), settings_of(of.SigmoidLoss)).item() == pytest.approx(0.554355, abs=1e-6)


def test_cdpo_by_hand() -> None:
    # β h = 0.3 as above, ε = 0.1: 0.9 * 0.554355 + 0.1 * 0.854355 = 0.584355
    loss = sigmoid(one_pair(), settings_of(of.SigmoidLoss, label_smoothing=0.1))
    assert loss.item() == pytest.approx(0.584355, abs=1e-6)


def test_robust_by_hand() -> None:
    # β h = 0.3 as above, ε = 0.1: (0.9 * 0.554355 - 0.1 * 0.854355) / 0.8 = 0.516855
    assert robust(one_pair(), settings_of(of.RobustLoss, beta=0.1)).item() == pytest.approx(0.516855, abs=1e-6)


def test_ipo_by_hand() -> None:
    # Δ_c / |y_c| = 2 / 4 = 0.5, Δ_r / |y_r| = -1 / 2 = -0.5, gap 1, target 1 / (2 * 0.1) = 5: (1 - 5)^2 = 16
    # One length for both: (3 / 4 - 5)^2 = 18.06. Summed, not averaged: (3 - 5)^2 = 4.
    for over_tokens, wanted in (("mean", 16.0), ("sum", 4.0)):
        loss = PREFERENCE_LOSSES["ipo"](one_pair(), settings_of(of.IpoLoss, over_tokens=over_tokens))
        assert loss.item() == pytest.approx(wanted, abs=1e-5)


def one_pair() -> PairBatch:
    return PairBatch(*(torch.tensor([value]) for value in (-10.0, -11.0, -12.0, -10.0, 4, 2)))


def test_implicit_rewards_by_hand() -> None:
    # Sums, whatever the loss: 0.1 * 2 and 0.1 * -1.
    chosen, rejected = implicit_rewards(one_pair(), 0.1)
    assert chosen.item() == pytest.approx(0.2)
    assert rejected.item() == pytest.approx(-0.1)


def test_robust_is_the_loss_of_the_true_labels_over_flips() -> None:
    # (1 - ε) L(as labelled) + ε L(flipped) = DPO's loss, ε = 0.3.
    pairs = random_pairs()
    flipped = PairBatch(*(pairs[place] for place in (1, 0, 3, 2, 5, 4)))
    settings = settings_of(of.RobustLoss, flip_rate=0.3)
    mean = 0.7 * robust(pairs, settings) + 0.3 * robust(flipped, settings)
    torch.testing.assert_close(mean, sigmoid(pairs, settings_of(of.SigmoidLoss, beta=settings.beta)))


def test_swapping_the_pair_swaps_rewards_and_differs_in_loss_by_the_margin() -> None:
    # -log σ(-x) - -log σ(x) = x, and x is the reward margin.
    pairs = random_pairs()
    swapped = PairBatch(*(pairs[place] for place in (1, 0, 3, 2, 5, 4)))
    chosen, rejected = implicit_rewards(pairs, 0.1)
    torch.testing.assert_close((rejected, chosen), implicit_rewards(swapped, 0.1))
    one, other = (sigmoid(batch, settings_of(of.SigmoidLoss)) for batch in (pairs, swapped))
    torch.testing.assert_close(other - one, chosen - rejected)


def test_smoothed_loss_is_least_where_the_policy_grants_the_flip_rate() -> None:
    # cDPO's optimum: σ(β h) = 1 - ε, so β h = log(0.8 / 0.2) for ε = 0.2; there the gradient is 0.
    chosen = torch.tensor([math.log(4.0) / 0.1], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(1, dtype=torch.float64)
    pairs = PairBatch(chosen, *[zeros] * 3, *[torch.ones(1)] * 2)
    sigmoid(pairs, settings_of(of.SigmoidLoss, label_smoothing=0.2)).backward()
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_scores_are_derivatives_of_the_generators(divergence: AnyDivergence) -> None:
    # At -100 an exponent of 80 is the end; at 0 each score is 0 and has slope f″(1) = 1, but for Jensen-Shannon's 1/2.
    deltas = torch.tensor([-100.0, -3.0, 0.0, 2.5, 100.0], dtype=torch.float64, requires_grad=True)
    found = scores(deltas, divergence)
    assert found.tolist() == pytest.approx(
        [float(score(mpf(own), divergence, 80)) for own in deltas.tolist()], rel=1e-12
    )
    (slopes,) = torch.autograd.grad(found.sum(), deltas)
    assert slopes[2].item() == pytest.approx(0.5 if divergence.type == "js" else 1.0)


def test_alpha_1_is_the_forward_kl_and_alpha_towards_0_the_reverse_kl() -> None:
    deltas = torch.linspace(-3, 3, 7, dtype=torch.float64)
    one, least = (scores(deltas, settings_of(AlphaDivergence, alpha=alpha)) for alpha in (1.0, 1e-7))
    torch.testing.assert_close(one, scores(deltas, settings_of(ForwardKl)))
    torch.testing.assert_close(least, deltas, rtol=1e-5, atol=1e-5)


def test_the_share_of_exponents_at_their_limit() -> None:
    pairs = pairs_of([(-100.0, -79.0), (-81.0, -100.0), (0.0, 100.0), (-50.0, 0.0)])
    forward = block(ForwardKl)
    assert clamped_shares(pairs, settings_of(of.SigmoidLoss, divergence=forward)).tolist() == [0.5, 1, 0, 0]
    assert clamped_shares(pairs, settings_of(of.IpoLoss, divergence=forward)).tolist() == [1, 1, 0, 0.5]
    half = settings_of(of.SigmoidLoss, divergence=block(AlphaDivergence, alpha=0.5))
    assert clamped_shares(pairs, half).tolist() == [0, 0, 0, 0]
    # z = β h: -21, 19, -100, -50.
    assert clamped_shares(pairs, settings_of(of.DiscopopLoss, beta=1.0)).tolist() == [0, 0, 1, 0]
    both = settings_of(of.DiscopopLoss, divergence=forward)
    assert clamped_shares(pairs, both).tolist() == pytest.approx([2 / 3, 2 / 3, 0, 1 / 3])
    assert [own.type for own in map(settings_of, SINGLE) if of.has_exponents(own)] == ["discopop"]


@pytest.mark.parametrize("kind", [of.AotLoss, of.AotUnpairedLoss])
def test_alignment_by_transport_of_one_pair_is_cdpo(kind: type) -> None:
    pairs = random_pairs(1)
    losses, *gradients = value_and_gradient(pairs, settings_of(kind, label_smoothing=0.1))
    of_cdpo, *cdpo_gradients = value_and_gradient(pairs, settings_of(of.SigmoidLoss, label_smoothing=0.1))
    torch.testing.assert_close((losses, gradients), (of_cdpo, cdpo_gradients))


def test_the_mean_of_rewards_runs_over_steps_and_is_saved() -> None:
    # β = 0.5: rewards 1, 3 of chosen and -1, 2 of rejected replies: mean 1.25; then 10 and 4: (5 + 14) / 6.
    settings = settings_of(of.BcoPairLoss, beta=0.5)
    steps = [pairs_of([(2.0, -2.0), (6.0, 4.0)]), pairs_of([(20.0, 8.0)])]
    shift = RunningMean()
    assert ties_of_step(steps[0], settings, shift, train=True).shift == pytest.approx(1.25)
    assert ties_of_step(steps[1], settings, shift, train=False).shift == pytest.approx(1.25)
    resumed = RunningMean()
    resumed.load_state_dict(shift.state_dict())
    for own in (shift, resumed):
        assert ties_of_step(steps[1], settings, own, train=True).shift == pytest.approx(19 / 6)


def test_each_loss_of_the_settings_has_its_function_and_is_tested_here() -> None:
    types = [settings_of(kind).type for kind in SINGLE]
    assert types == [*PREFERENCE_LOSSES] == [*BY_PAPER]
    assert {*FIRST_VALUES} == {*types} - {*of.WITHOUT_REFERENCE}
    page = (PROJECT / "docs/preference_losses.md").read_text(encoding="utf-8")
    named = {
        name for line in page.splitlines() if line.startswith("| ") for name in line.split(" | ")[0][2:].split(", ")
    }
    assert named == {"type", "mixture", *types}


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        (of.ExoPairLoss, {"label_smoothing": 0.0}, "greater than 0"),  # log 0
        (of.RobustLoss, {"flip_rate": 0.5}, "less than 0.5"),
        (of.SigmoidLoss, {"reference_free": True, "divergence": block(ForwardKl)}, "nothing to diverge from"),
        (AlphaDivergence, {"alpha": 0.0}, "greater than 0"),
        (of.MixtureLoss, {"parts": {}}, "at least 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(kind: type, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings_of(kind, **changed)


def test_which_losses_read_what_of_a_reference() -> None:
    free, discounted = ({"reference_free": True}, {"ld_alpha": 0.5})
    rpo = settings_of(of.MixtureLoss)
    of_free = block(of.WeightedLoss, loss=block(of.SigmoidLoss, **free))
    alone = settings_of(of.MixtureLoss, parts={"free": of_free, "sft": rpo.parts["sft"].model_dump()})
    assert [of.needs_reference(loss) for loss in (rpo, alone, settings_of(of.SigmoidLoss, **free))] == [
        True,
        False,
        False,
    ]
    assert of.needs_tokens_of_reference(settings_of(of.SigmoidLoss, **discounted))
    assert not of.needs_tokens_of_reference(settings_of(of.SigmoidLoss, **free, **discounted))
    assert not of.needs_tokens_of_reference(rpo)
