"""Per-sequence sums, the EOS included, whatever the micro-batch."""

import pytest
import torch

from stages.lib.compute.sequence_logprobs import all_pair_logps, all_pair_token_logps, all_response_logps
from stages.lib.models.token_logprobs import TokenLogProbs
from tests.tiny_models import EOS, batching, tiny_llama

PAIRS = {
    "prompt_ids": [[3, 4], [5], [6, 7, 8]],
    "chosen_ids": [[9, EOS], [10, 11, 12, EOS], [13, EOS]],
    "rejected_ids": [[14, 15, EOS], [EOS], [16, 17, 18, 19, EOS]],
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_sums_are_those_of_each_sequence_alone(budget: int, packing: bool) -> None:
    model = tiny_llama()
    module, plan = TokenLogProbs(model), batching(budget, packing)
    result = all_pair_logps(module, PAIRS, plan)
    responses = all_response_logps(module, PAIRS["prompt_ids"], PAIRS["chosen_ids"], plan)
    assert responses.tolist() == pytest.approx(result.chosen.tolist(), abs=1e-4)
    per_token = all_pair_token_logps(module, PAIRS, plan)
    assert [part.tolist() for part in per_token.sums] == [part.tolist() for part in result]
    for name, sums, tokens in (
        ("chosen_ids", result.chosen, per_token.chosen),
        ("rejected_ids", result.rejected, per_token.rejected),
    ):
        for row, completion in enumerate(PAIRS[name]):
            prompt = PAIRS["prompt_ids"][row]
            with torch.no_grad():
                log_probs = torch.log_softmax(model(torch.tensor([prompt + completion])).logits[0], dim=-1)
            places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
            wanted = [float(log_probs[place, token]) for place, token in zip(places, completion, strict=True)]
            assert tokens[row] == pytest.approx(wanted, abs=1e-4)
            assert float(sums[row]) == pytest.approx(sum(wanted), abs=1e-4)
