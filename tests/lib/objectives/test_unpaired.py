"""The objective on single replies: z0, δ, means and gradients by hand, however rows are cut and shared out."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.lib.models.token_logprobs import TokenLogProbs, TokenStatistics
from stages.lib.objectives.fit import global_means
from stages.lib.objectives.unpaired import UnpairedObjective
from stages.lib.settings.unpaired_loss import ApoZeroUnpairedLoss, BcoLoss, KtoLoss, UnpairedLoss
from tests.lib.objectives.test_objectives import CUTS, Unigram
from tests.tiny_models import EOS, batching, tiny_llama
from tests.two_processes import run_on_two_processes

KTO = KtoLoss(type="kto", beta=0.1, desirable_weight=1.5, undesirable_weight=0.5)
BCO = BcoLoss(type="bco", beta=0.1)
APO = ApoZeroUnpairedLoss(type="apo_zero_unpaired", beta=0.1)
REPLIES: dict[str, list[Any]] = {
    "prompt_ids": [[0], [0, 0], [0]],
    "completion_ids": [[1, 1], [2], [3]],
    "label": [True, False, True],
    "mismatched_ids": [[2], None, [1, 1, 1]],
    "reference_logps": [-5.0, -1.0, -4.0],
    "reference_mismatched_logps": [-2.5, None, -4.0],
}
# log π of the module below: -2, -2, -4, so Δ = 3, -1, 0; of the mismatched ones -2 and -3, so Δ = 0.5 and 1.


class AtOneTemperature(Unigram):
    """It is also asked without gradients, with the temperature of sampling beside the inputs."""

    def forward(self, *inputs: Any, run: str = "log_probs") -> tuple:
        found = super().forward(*inputs[:4], run=run)
        if run == "log_probs":
            return TokenStatistics(*found)
        logps, entropies, mean_logits, collisions = found
        # Token 3 has logits higher by 1.
        return logps, entropies, mean_logits + (inputs[0] == 3), collisions


def unigram() -> Unigram:
    return AtOneTemperature(0.0, -1.0, -2.0, -4.0)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@CUTS
def test_kto_by_hand(tokens: int) -> None:
    module, z0 = unigram(), 0.75
    objective = UnpairedObjective(batching(tokens, pad_id=0), KTO)
    found = global_means(objective, module, REPLIES, train=True)
    assert global_means(objective, module, REPLIES, train=False) == found
    losses = [1.5 * (1 - sigma(0.1 * (3 - z0))), 0.5 * (1 - sigma(0.1 * (z0 + 1))), 1.5 * (1 - sigma(0.1 * (0 - z0)))]
    assert found == pytest.approx(
        {
            "loss": sum(losses) / 3,
            "rewards/chosen": 0.15,
            "rewards/rejected": -0.1,
            "rewards/margins": 0.25,
            "logps/chosen": -3.0,
            "logps/rejected": -2.0,
            "logits/chosen": 7 / 3,
            "logits/rejected": 2.0,
            "entropy": 0.5,
            "kl": z0,
        },
        abs=1e-6,
    )
    # dL/dΔ = −s λ β σ(x) σ(−x) / 3, and log π of a token is its log-prob as often as it stands there; none by z0.
    slopes = [
        -sign * weight * 0.1 * sigma(x) * sigma(-x) / 3
        for sign, weight, x in ((1, 1.5, 0.225), (-1, 0.5, 0.175), (1, 1.5, -0.075))
    ]
    assert module.logps.grad.tolist() == pytest.approx([0.0, 2 * slopes[0], slopes[1], slopes[2]], abs=1e-7)


def test_a_negative_mean_on_mismatched_replies_counts_as_0_and_so_does_none() -> None:
    lower = REPLIES | {"reference_mismatched_logps": [-1.0, None, -1.0]}  # Δ = -1 and -2
    without = REPLIES | {"mismatched_ids": [None] * 3, "reference_mismatched_logps": [None] * 3}
    for rows in (lower, without):
        found = global_means(UnpairedObjective(batching(100, pad_id=0), KTO), unigram(), rows, train=False)
        assert found["kl"] == 0
        losses = [1.5 * (1 - sigma(0.3)), 0.5 * (1 - sigma(0.1)), 0.75]
        assert found["loss"] == pytest.approx(sum(losses) / 3)


@CUTS
def test_bco_measures_from_the_mean_of_all_rewards_so_far(tokens: int) -> None:
    objective, module = UnpairedObjective(batching(tokens, pad_id=0), BCO), unigram()
    first = global_means(objective, module, REPLIES, train=True)
    delta = 0.1 * (3 - 1 + 0) / 3
    losses = [-math.log(sigma(0.3 - delta)), -math.log(sigma(delta + 0.1)), -math.log(sigma(0 - delta))]
    assert first["loss"] == pytest.approx(sum(losses) / 3)
    assert first["delta"] == pytest.approx(delta)
    slopes = [-sigma(delta - 0.3), sigma(-0.1 - delta), -sigma(delta)]  # of the logits; none by δ
    assert module.logps.grad.tolist() == pytest.approx(
        [0.0, 2 * 0.1 * slopes[0] / 3, 0.1 * slopes[1] / 3, 0.1 * slopes[2] / 3], abs=1e-7
    )
    one = {name: values[:1] for name, values in REPLIES.items()}
    # An evaluation measures from the same and changes nothing; the next step's reward of 0.3 joins the three before.
    assert global_means(objective, module, one, train=False)["delta"] == pytest.approx(delta)
    assert global_means(objective, module, one, train=True)["delta"] == pytest.approx((3 * delta + 0.3) / 4)
    assert objective.state_dict() == {"count": 4, "mean": pytest.approx((3 * delta + 0.3) / 4)}


def test_what_is_remembered_goes_on_after_a_checkpoint() -> None:
    before, after = (UnpairedObjective(batching(100, pad_id=0), BCO) for _ in range(2))
    global_means(before, unigram(), REPLIES, train=True)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    one = {name: values[:1] for name, values in REPLIES.items()}
    found = [global_means(objective, unigram(), one, train=True) for objective in (before, after)]
    assert found[0] == found[1]


def test_a_metric_of_replies_that_are_not_there_is_left_out() -> None:
    good = {name: [values[0], values[2]] for name, values in REPLIES.items()}
    found = global_means(UnpairedObjective(batching(100, pad_id=0), APO), unigram(), good, train=False)
    of_replies = {"loss": (1 - sigma(0.3) + 0.5) / 2, "rewards/chosen": 0.15, "logps/chosen": -3.0}
    assert found == pytest.approx(of_replies | {"logits/chosen": 7 / 3, "entropy": 0.5}, abs=1e-6)


def test_the_tokens_of_the_replies_are_counted() -> None:
    assert UnpairedObjective(batching(100), KTO).units(REPLIES) == 4 + 4


def random_replies(count: int = 11) -> dict[str, list[Any]]:
    draw = np.random.default_rng(3)

    def ids(most: int) -> list[int]:
        return draw.integers(3, 23, size=draw.integers(1, most)).tolist()

    completions = [[*ids(9), EOS] for _ in range(count)]
    logps = (-draw.uniform(20, 40, size=(2, count))).tolist()
    return {
        "prompt_ids": [ids(6) for _ in range(count)],
        "completion_ids": completions,
        "label": [number % 3 != 0 for number in range(count)],
        "mismatched_ids": [None if number == 4 else completions[number - 1] for number in range(count)],
        "reference_logps": logps[0],
        "reference_mismatched_logps": [None if number == 4 else logps[1][number] for number in range(count)],
    }


def means_and_gradient(loss: UnpairedLoss, **plan: Any) -> tuple[dict[str, float], torch.Tensor]:
    module = TokenLogProbs(tiny_llama().double())
    module.backward = torch.Tensor.backward
    found = global_means(UnpairedObjective(batching(**plan), loss), module, random_replies(), train=True)
    return found, torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("loss", [KTO, BCO], ids=lambda loss: loss.type)
def test_cut_packed_or_whole_a_step_is_the_same_in_float64(loss: UnpairedLoss) -> None:
    whole, gradient = means_and_gradient(loss, tokens=1000)
    for plan in ({"tokens": 1}, {"tokens": 25, "packing": True}):
        found, other = means_and_gradient(loss, **plan)
        # z0 and δ go through log-probs that are gathered in float32.
        assert found == pytest.approx(whole, rel=1e-6)
        assert float((other - gradient).norm() / gradient.norm()) < 1e-6


ON_TWO = """
import json, sys
from pathlib import Path
from stages.lib.compute.processes import join_processes
from stages.lib.compute.sequence_logprobs import all_pair_token_logps
from stages.lib.models.token_logprobs import TokenLogProbs, TokenStatistics
from stages.lib.objectives.fit import global_means
from stages.lib.objectives.unpaired import UnpairedObjective
from stages.lib.settings.runtime import read_runtime
from tests.lib.compute.test_sequence_logprobs import PAIRS
from tests.lib.objectives.test_unpaired import BCO, KTO, random_replies
from tests.tiny_models import batching, tiny_llama
import torch
processes = join_processes(read_runtime("train_unpaired"))
found = {}
for loss in (KTO, BCO):
    module = TokenLogProbs(tiny_llama().double())
    module.backward = torch.Tensor.backward
    plan = batching(25, processes=processes)
    found[loss.type] = global_means(UnpairedObjective(plan, loss), module, random_replies(), train=True)
    gradient = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    processes.sum_tensor(gradient)
    found[loss.type]["norm"] = float(gradient.norm())
found["tokens"] = all_pair_token_logps(module, PAIRS, plan)[1:]
Path(f"{processes.rank}.done").write_text(json.dumps(found))
processes.leave()
"""


def test_two_processes_agree_on_the_shift_and_on_log_probs_of_tokens(tmp_path: Path) -> None:
    from stages.lib.compute.sequence_logprobs import all_pair_token_logps
    from tests.lib.compute.test_sequence_logprobs import PAIRS

    run_on_two_processes(ON_TWO, tmp_path)
    own, other = (json.loads((tmp_path / f"{rank}.done").read_text()) for rank in range(2))
    assert own == other
    for loss in (KTO, BCO):
        alone, gradient = means_and_gradient(loss, tokens=25)
        assert own[loss.type] == pytest.approx({**alone, "norm": float(gradient.norm())}, rel=1e-6)
    alone = all_pair_token_logps(TokenLogProbs(tiny_llama().double()), PAIRS, batching(25))[1:]
    for found, expected in zip(own["tokens"], alone, strict=True):
        for row, wanted in zip(found, expected, strict=True):
            assert row == pytest.approx(wanted)
