"""A reward model's scores are those of each sequence alone, read at its last token, whatever the micro-batch."""

from dataclasses import replace

import pytest
import torch

from stages.lib.compute.sequence_scores import all_pair_scores, all_scores
from stages.lib.models.scalar_scores import SequenceScores
from stages.lib.settings.runtime import PassCost
from tests.lib.compute.test_sequence_logprobs import PAIRS
from tests.tiny_models import batching, tiny_classifier


def alone(model, prompt, completion):
    """The head on the hidden state of the last token, by transformers."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([prompt + completion])).last_hidden_state[0, -1]
        return float(hidden @ model.score.weight[0])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_scores_are_those_of_each_sequence_alone(budget: int, packing: bool) -> None:
    model = tiny_classifier().eval()
    scorer, plan = SequenceScores(model), batching(budget, packing)
    wanted = {
        name: [alone(model, *pair) for pair in zip(PAIRS["prompt_ids"], PAIRS[name], strict=True)]
        for name in ("chosen_ids", "rejected_ids")
    }
    assert all_scores(scorer, PAIRS["prompt_ids"], PAIRS["chosen_ids"], plan) == pytest.approx(
        wanted["chosen_ids"], abs=1e-5
    )
    chosen, rejected = all_pair_scores(scorer, PAIRS, plan)
    assert chosen == pytest.approx(wanted["chosen_ids"], abs=1e-5)
    assert rejected == pytest.approx(wanted["rejected_ids"], abs=1e-5)


def test_what_comes_twice_is_scored_once() -> None:
    """Else two equal responses of a group would differ in the last digits, and teach that difference."""
    model, seen = tiny_classifier().eval(), []

    def scorer(*inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs[0].shape)
        return SequenceScores(model)(*inputs)

    prompts, replies = [[3, 4, 5, 6], [3, 4, 5, 6], [7], [3, 4, 5, 6]], [[8, 9], [10], [8, 9], [8, 9]]
    plan = replace(batching(1000), cost=PassCost(overhead=1, attention=10**9), longest_shared=100)
    found = all_scores(scorer, prompts, replies, plan)
    assert found[0] == found[3]
    wanted = [alone(model, *pair) for pair in zip(prompts, replies, strict=True)]
    assert found == pytest.approx(wanted, abs=1e-5)
    assert sorted(seen) == [(1, 3), (1, 3 + 3 + 2)]
