"""What the four models say of rollouts, against each model on each sequence alone."""

import pytest
import torch

from stages.lib.models.scalar_scores import SequenceScores, TokenScores
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.rollouts import Scored, assemble, score_responses, values_before
from tests.tiny_models import CPU, EOS, batching, tiny_classifier, tiny_llama

PROMPTS = [[3, 4], [5], [6, 7, 8]]
RESPONSES = [[9, EOS], [10, 11, 12, EOS], [13]]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("budget", [6, 1000])
def test_every_response_gets_its_own_numbers(budget: int, packing: bool) -> None:
    policy, reference = tiny_llama(1), tiny_llama(2)
    critic, reward_model = tiny_classifier(3), tiny_classifier(4)
    scored = score_responses(
        PROMPTS,
        RESPONSES,
        policy=TokenLogProbs(policy, with_entropies=True),
        reference=TokenLogProbs(reference),
        critic=TokenScores(critic),
        reward_model=SequenceScores(reward_model),
        batching=batching(budget, packing),
    )
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            log_probs, reference_log_probs = (
                torch.log_softmax(model(ids).logits[0], -1) for model in (policy, reference)
            )
            states = [critic(ids[:, : len(prompt) + t]).logits.item() for t in range(len(response))]
            score = reward_model(ids).logits.item()
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        wanted = [float(log_probs[place, token]) for place, token in zip(places, response, strict=True)]
        assert scored[row].logps == pytest.approx(wanted, abs=1e-5)
        wanted = [float(reference_log_probs[place, token]) for place, token in zip(places, response, strict=True)]
        assert scored[row].reference_logps == pytest.approx(wanted, abs=1e-5)
        assert scored[row].values == pytest.approx(states, abs=1e-5)
        assert scored[row].score == pytest.approx(score, abs=1e-5)


def test_the_value_of_a_token_is_that_of_the_state_before_it() -> None:
    critic = TokenScores(tiny_classifier())
    (batch,) = batching(1000, packing=False).sequences(PROMPTS, RESPONSES)
    values, scores = values_before(critic, batch), critic(*batch.inputs)
    assert torch.equal(values[:, 1:], scores[:, :-1])
    assert values[:, 0].count_nonzero() == 0


def test_lists_become_aligned_tensors() -> None:
    logps = [[-1.0, -2.0], [-3.0, -4.0, -5.0, -6.0], [-7.0]]
    reference = [[-1.5, -2.0], [-3.0, -4.0, -5.0, -7.0], [-9.0]]
    columns = (logps, reference, logps, logps, [0.5, 1.5, 2.5])
    scored = [Scored(*row) for row in zip(*columns, strict=True)]
    rollouts = assemble(PROMPTS, RESPONSES, scored, kl_estimator="k1", eos_id=EOS, device=CPU)
    assert rollouts.response_mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert rollouts.kl.tolist() == [[0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]]
    assert rollouts.logps.tolist() == [[-1, -2, 0, 0], [-3, -4, -5, -6], [-7, 0, 0, 0]]
    assert rollouts.ended.tolist() == [True, True, False]
    assert rollouts.scores.tolist() == [0.5, 1.5, 2.5]
