"""The objective of preference losses: mixtures, modifiers and metrics by hand, and the same step however it is cut."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.objectives.fit import global_means
from stages.lib.objectives.preference import PreferenceObjective, metrics_of_loss
from stages.lib.objectives.step_ties import TIED
from stages.lib.settings import preference_loss as of
from stages.lib.settings.declaration import block
from stages.lib.settings.divergence import ForwardKl
from tests.lib.objectives.test_objectives import CUTS, PAIRS, Unigram
from tests.lib.objectives.test_preference_losses import SINGLE, settings_of
from tests.tiny_models import batching, tiny_llama
from tests.two_processes import run_on_two_processes


def module() -> Unigram:
    return Unigram(0.0, -1.0, -2.0, -4.0)


def means(loss: of.PreferenceLoss, tokens: int = 100, rows: dict[str, Any] = PAIRS) -> dict[str, float]:
    return global_means(PreferenceObjective(batching(tokens), loss), module(), dict(rows), train=True)


def mixture(**parts: tuple[float, of.PairLoss]) -> of.MixtureLoss:
    blocks = {name: {"weight": weight, "loss": loss.model_dump()} for name, (weight, loss) in parts.items()}
    return TypeAdapter(of.MixtureLoss).validate_python({"type": "mixture", "parts": blocks})


@CUTS
def test_cross_entropy_is_a_mean_over_the_tokens_of_the_step(tokens: int) -> None:
    # Chosen replies: (1 + 1) nats over 2 tokens, and 2 over 1: 4 / 3; the mean of the pairs' means would be 1.5.
    found = means(settings_of(of.SftLoss), tokens)
    assert found["loss"] == pytest.approx(4 / 3)


@CUTS
def test_a_mixture_is_the_weighted_sum_of_its_parts(tokens: int) -> None:
    # Δ: 3 and -1; -1 and 1. Of the rewards β is that of the hinge: 0.25 · mean(3, -1).
    hinge = settings_of(of.HingeLoss, beta=0.25)
    found = means(mixture(margin=(0.5, hinge), likely=(3.0, settings_of(of.SftLoss))), tokens)
    assert found["loss/margin"] == pytest.approx((0 + 1.5) / 2)
    assert found["loss/likely"] == pytest.approx(4 / 3)
    assert found["loss"] == pytest.approx(0.375 + 4)
    assert found["rewards/chosen"] == pytest.approx(0.25)


def test_without_a_reference_a_reward_is_of_the_log_prob() -> None:
    # log π: -2 and -2; -2 and -12. Per token: -1 and -2; -2 and -4.
    without = {name: values for name, values in PAIRS.items() if not name.startswith("reference")}
    free = settings_of(of.SigmoidLoss, beta=0.5, reference_free=True)
    found = means(free, rows=without)
    assert found["loss"] == pytest.approx((math.log(2) + math.log1p(math.exp(-5))) / 2)
    assert (found["rewards/chosen"], found["rewards/rejected"]) == (-1.0, -3.5)
    assert found["rewards/accuracies"] == 0.75
    simpo = means(settings_of(of.SimpoLoss), rows=without)
    assert (simpo["rewards/chosen"], simpo["rewards/rejected"]) == (-3.0, -6.0)
    assert simpo["loss"] == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2)
    assert means(settings_of(of.OrpoLoss), rows=without)["rewards/margins"] == pytest.approx(0.1 * 1.5)


def test_a_reference_in_the_table_is_not_read_by_a_loss_without_one() -> None:
    free = settings_of(of.SigmoidLoss, beta=0.5, reference_free=True)
    without = {name: values for name, values in PAIRS.items() if not name.startswith("reference")}
    assert means(free)["loss"] == means(free, rows=without)["loss"]


@CUTS
def test_weights_of_wpo_by_hand(tokens: int) -> None:
    # Log-collisions of -1: chosen tokens of -1 have 0 each, of -2 a log-factor of -1; rejected ones -1, and -3 each.
    # W: e^(0 - 1), e^(-1 - 3). Hinge losses: 1 - 0.25 · 4 = 0 and 1.5.
    found = means(settings_of(of.HingeLoss, beta=0.25, wpo=True), tokens)
    assert found["wpo/weight"] == pytest.approx((math.exp(-1) + math.exp(-4)) / 2)
    assert found["loss"] == pytest.approx(1.5 * math.exp(-4) / 2)


@CUTS
def test_length_is_discounted_under_policy_and_reference(tokens: int) -> None:
    # α = 0.5. Policy: -1 - 0.5 and -2; -2 and -4 - 0.5 · 8. Reference: -2 - 0.5 · 3 and -1; -1 and -3 - 0.5 · 10.
    # h: (2 - -1) = 3 and (-1 - 0) = -1, so that 1 - 0.25 h is 0.25 and 1.25.
    of_tokens = {
        "reference_chosen_token_logps": [[-2.0, -3.0], [-1.0]],
        "reference_rejected_token_logps": [[-1.0], [-3.0, -4.0, -6.0]],
    }
    found = means(settings_of(of.HingeLoss, beta=0.25, ld_alpha=0.5), tokens, PAIRS | of_tokens)
    assert found["loss"] == pytest.approx(0.75)
    assert found["logps/rejected"] == -7.0


def test_the_share_of_held_exponents_is_shown_where_there_are_any() -> None:
    loss = settings_of(of.SigmoidLoss, divergence=block(ForwardKl))
    far = PAIRS | {"reference_chosen_logps": [0.0, 90.0]}  # Δ_c = -92
    assert means(loss, rows=far)["exponents/clamped"] == 0.25
    assert "exponents/clamped" not in metrics_of_loss(settings_of(of.SigmoidLoss))


ROWS = {
    "prompt_ids": [[3, 4], [5], [6, 7, 8], [3], [9, 3]],
    "chosen_ids": [[9, 1], [10, 11, 12, 1], [13, 1], [14, 15, 1], [16, 17, 18, 1]],
    "rejected_ids": [[11, 12, 1], [9, 1], [14, 13, 12, 1], [1], [19, 1]],
    "reference_chosen_logps": [-9.0, -16.0, -8.0, -13.0, -14.0],
    "reference_rejected_logps": [-12.0, -7.0, -15.0, -4.0, -8.0],
}


CUT = (batching(1000), batching(40), batching(1), batching(40, packing=True), replace(batching(40), longest_shared=50))


def test_no_cut_changes_a_step() -> None:
    """A mixture of all losses over five pairs: in one pass, in some, a pair a pass, packed, and with shared prompts."""
    # SPPO's loss is a million times the others'.
    weights = {kind: 1e-6 if kind is of.SppoHardLoss else 1.0 for kind in SINGLE}
    loss = mixture(**{block(kind)["type"]: (weight, settings_of(kind)) for kind, weight in weights.items()})
    results = []
    for cut in CUT:
        model = TokenLogProbs(tiny_llama())
        model.backward = lambda loss: loss.backward()
        objective = PreferenceObjective(cut, loss)
        found = global_means(objective, model, dict(ROWS), train=True)
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        results.append((found, gradient, objective.state_dict()["bco_pair"]["mean"]))
    (found, gradient, mean), *others = results
    for other, other_gradient, other_mean in others:
        assert other == pytest.approx(found, rel=1e-5, abs=1e-5)
        assert float((other_gradient - gradient).norm() / gradient.norm()) < 1e-5
        assert other_mean == pytest.approx(mean, rel=1e-5)


def test_the_running_mean_takes_in_steps_but_no_evaluation_and_goes_on_after_a_checkpoint() -> None:
    # β = 0.01; Δ of all replies 3, -1, -1, 1: mean reward 0.005.
    loss = settings_of(of.BcoPairLoss)
    objective = PreferenceObjective(batching(100), loss)
    global_means(objective, module(), dict(PAIRS), train=False)
    assert objective.state_dict() == {"bco_pair": {"count": 0, "mean": 0.0}}
    global_means(objective, module(), dict(PAIRS), train=True)
    assert objective.state_dict()["bco_pair"] == {"count": 4, "mean": pytest.approx(0.005)}
    resumed = PreferenceObjective(batching(100), loss)
    resumed.load_state_dict(objective.state_dict())
    one, other = (global_means(own, module(), dict(PAIRS), train=False)["loss"] for own in (objective, resumed))
    rewards = [(0.03, -0.01), (-0.01, 0.01)]
    wanted = [math.log1p(math.exp(0.005 - c)) + math.log1p(math.exp(r - 0.005)) for c, r in rewards]
    assert one == other == pytest.approx(sum(wanted) / 2)


ON_TWO = """
import torch
from pathlib import Path
from stages.lib.compute.processes import Processes, join_processes
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.objectives.fit import global_means
from stages.lib.objectives.preference import PreferenceObjective
from stages.lib.settings.runtime import read_runtime
from tests.lib.objectives.test_preference import ROWS, TIED_ALL
from tests.tiny_models import CPU, batching, tiny_llama

processes = join_processes(read_runtime("train_dpo"))
results = []
for own in (Processes(0, 1, CPU), processes):
    model = TokenLogProbs(tiny_llama())
    model.backward = lambda loss: loss.backward()
    objective = PreferenceObjective(batching(40, processes=own), TIED_ALL)
    found = global_means(objective, model, dict(ROWS), train=True)
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    own.sum_tensor(gradient)
    results.append((found, gradient, objective.state_dict()["bco_pair"]["mean"]))
(alone, of_one, mean), (shared, of_two, other_mean) = results
assert all(abs(alone[name] - shared[name]) < 1e-5 * max(1, abs(alone[name])) for name in alone)
assert float((of_one - of_two).norm() / of_one.norm()) < 1e-5
assert abs(mean - other_mean) < 1e-6
Path(f"{processes.rank}.done").touch()
processes.leave()
"""
TIED_ALL = mixture(**{block(kind)["type"]: (1.0, settings_of(kind)) for kind in (*TIED, of.SftLoss)})


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    run_on_two_processes(ON_TWO, tmp_path)
