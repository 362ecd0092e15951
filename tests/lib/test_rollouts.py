"""What the four models say of rollouts, against each model on each sequence alone."""

import pytest
import torch

from stages.lib.batching import sequence_batches
from stages.lib.params import load_yaml
from stages.lib.rollouts import Scored, assemble, on_response, response_tensor, score_responses, values_before
from stages.lib.runtime import Runtime
from stages.lib.scalar_scores import SequenceScores, TokenScores
from stages.lib.token_logprobs import TokenLogProbs
from tests.real_files import PROJECT
from tests.tiny_models import CPU, EOS, PAD, tiny_classifier, tiny_llama

PROMPTS = [[3, 4], [5], [6, 7, 8]]
RESPONSES = [[9, EOS], [10, 11, 12, EOS], [13]]


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(**{**load_yaml(PROJECT / "runtime.yaml")["default"], "micro_batch_tokens": 6})


def test_every_response_gets_its_own_numbers(runtime: Runtime) -> None:
    policy, reference = tiny_llama(1), tiny_llama(2)
    critic, reward_model = tiny_classifier(3), tiny_classifier(4)
    scored = score_responses(
        PROMPTS,
        RESPONSES,
        policy=TokenLogProbs(policy, with_entropies=True),
        reference=TokenLogProbs(reference),
        critic=TokenScores(critic),
        reward_model=SequenceScores(reward_model),
        runtime=runtime,
        pad_id=PAD,
        device=CPU,
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
        assert scored.logps[row] == pytest.approx(wanted, abs=1e-5)
        wanted = [float(reference_log_probs[place, token]) for place, token in zip(places, response, strict=True)]
        assert scored.reference_logps[row] == pytest.approx(wanted, abs=1e-5)
        assert scored.values[row] == pytest.approx(states, abs=1e-5)
        assert scored.scores[row] == pytest.approx(score, abs=1e-5)


def test_the_value_of_a_token_is_that_of_the_state_before_it() -> None:
    critic = TokenScores(tiny_classifier())
    (batch,) = sequence_batches(PROMPTS, RESPONSES, 1000, PAD, CPU)
    values, scores = values_before(critic, batch), critic(batch.input_ids, batch.attention_mask)
    assert torch.equal(values[:, 1:], scores[:, :-1])
    assert values[:, 0].count_nonzero() == 0


def test_lists_become_aligned_tensors() -> None:
    logps = [[-1.0, -2.0], [-3.0, -4.0, -5.0, -6.0], [-7.0]]
    reference = [[-1.5, -2.0], [-3.0, -4.0, -5.0, -7.0], [-9.0]]
    scored = Scored(logps, reference, logps, logps, [0.5, 1.5, 2.5])
    rollouts = assemble(PROMPTS, RESPONSES, scored, kl_estimator="k1", eos_id=EOS, device=CPU)
    assert rollouts.response_mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert rollouts.kl.tolist() == [[0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]]
    assert rollouts.logps.tolist() == [[-1, -2, 0, 0], [-3, -4, -5, -6], [-7, 0, 0, 0]]
    assert rollouts.ended.tolist() == [True, True, False]
    assert rollouts.scores.tolist() == [0.5, 1.5, 2.5]


def test_values_move_from_sequences_to_responses() -> None:
    (batch,) = sequence_batches(PROMPTS, RESPONSES, 1000, PAD, CPU)
    on_tokens = on_response(batch.input_ids.float(), batch.completion_mask, 4)
    wanted = response_tensor([[float(token) for token in RESPONSES[row]] for row in batch.rows], CPU)
    assert torch.equal(on_tokens, wanted)
