"""What policy, reference and critic say of rollouts, against each model on each sequence alone."""

import math

import pytest
import torch

from stages.lib.command.errors import StageError
from stages.lib.data.prompts import Prompt
from stages.lib.models.scalar_scores import TokenScores
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rollouts import Rollouts, read_rollouts, summary, values_before
from tests.tiny_models import EOS, batching, tiny_classifier, tiny_llama

PROMPTS = [[3, 4], [5], [6, 7, 8]]
RESPONSES = [[9, EOS], [10, 11, 12, EOS], [13]]
EPISODES = [
    Episode(Prompt(10 + row, prompt, [], {}), ids, f"text {row}", ids[-1] == EOS, 0, None, [True] * len(ids))
    for row, (prompt, ids) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
]


def read(budget: int, packing: bool, temperature: float = 1.0, with_critic: bool = True) -> Rollouts:
    return read_rollouts(
        EPISODES,
        [0.5, 1.5, 2.5],
        TokenLogProbs(tiny_llama(1), with_entropies=True),
        TokenLogProbs(tiny_llama(2)),
        TokenScores(tiny_classifier(3)) if with_critic else None,
        temperature,
        batching(budget, packing),
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("budget", [6, 1000])
def test_every_response_gets_its_own_numbers(budget: int, packing: bool) -> None:
    rollouts = read(budget, packing, temperature=0.7)
    policy, reference, critic = tiny_llama(1), tiny_llama(2), tiny_classifier(3)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids, length = torch.tensor([prompt + response]), len(response)
        places = slice(len(prompt) - 1, len(prompt) + length - 1)
        with torch.no_grad():
            own, theirs = (torch.log_softmax(model(ids).logits[0] / 0.7, -1)[places] for model in (policy, reference))
            states = [critic(ids[:, : len(prompt) + t]).logits.item() for t in range(length)]
        chosen = torch.tensor(response)[:, None]
        assert rollouts.logps[row, :length].tolist() == pytest.approx(own.gather(1, chosen)[:, 0].tolist(), abs=1e-5)
        wanted = theirs.gather(1, chosen)[:, 0].tolist()
        assert rollouts.reference_logps[row, :length].tolist() == pytest.approx(wanted, abs=1e-5)
        entropies = torch.distributions.Categorical(logits=own).entropy().tolist()
        assert rollouts.entropies[row, :length].tolist() == pytest.approx(entropies, abs=1e-5)
        assert rollouts.values[row, :length].tolist() == pytest.approx(states, abs=1e-5)
        for tensor in (rollouts.logps, rollouts.reference_logps, rollouts.entropies, rollouts.values):
            assert tensor[row, length:].count_nonzero() == 0


def test_what_rollouts_hold_is_aligned() -> None:
    rollouts = read(1000, packing=False, with_critic=False)
    assert rollouts.response_mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert rollouts.ended.tolist() == [True, True, False]
    assert rollouts.scores.tolist() == [0.5, 1.5, 2.5]
    assert rollouts.rewards.tolist() == [[0, 0.5, 0, 0], [0, 0, 0, 1.5], [2.5, 0, 0, 0]]
    assert rollouts.values.count_nonzero() == 0
    assert (rollouts.prompts, rollouts.responses) == (PROMPTS, RESPONSES)


def by_hand() -> Rollouts:
    mask = read(1000, packing=False).response_mask
    logps = torch.tensor([[-1.0, -2, 9, 9], [-3, -4, -5, -6], [-7, 9, 9, 9]])
    reference = torch.tensor([[-1.5, -2, 0, 0], [-3, -4, -5, -7], [-9, 0, 0, 0]])
    entropies = torch.where(mask, 0.5, 0.0)
    return Rollouts(EPISODES, torch.tensor([0.5, 1.5, 2.5]), logps, mask, logps, reference, entropies, logps)


def test_the_kl_is_that_of_real_tokens() -> None:
    assert by_hand().kl("k1").tolist() == [[0.5, 0, 0, 0], [0, 0, 0, 1.0], [2.0, 0, 0, 0]]
    assert by_hand().kl("k2").tolist() == [[0.125, 0, 0, 0], [0, 0, 0, 0.5], [2.0, 0, 0, 0]]


def test_a_phase_in_numbers() -> None:
    rollouts = by_hand()
    assert summary(rollouts, rollouts.kl("k1")) == pytest.approx(
        {
            "objective/scores": 1.5,
            "objective/kl": 3.5 / 3,
            "objective/entropy": 3.5 / 3,  # half a nat for each of 7 tokens, summed over a response
            "response/length": 7 / 3,
            "response/eos_rate": 2 / 3,
            "policy/entropy": 0.5,
        }
    )


def test_samples_of_a_prompt_stand_in_one_row() -> None:
    episodes = [episode._replace(sample=sample) for episode in EPISODES for sample in range(2)]
    rollouts = by_hand()._replace(episodes=episodes)
    assert rollouts.groups(torch.arange(6)).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_the_value_of_a_token_is_that_of_the_state_before_it() -> None:
    critic = TokenScores(tiny_classifier())
    (batch,) = batching(1000, packing=False).sequences(PROMPTS, RESPONSES)
    values, scores = values_before(critic, batch), critic(*batch.inputs)
    assert torch.equal(values[:, 1:], scores[:, :-1])
    assert values[:, 0].count_nonzero() == 0


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_log_prob_that_is_not_finite_is_refused_with_its_token(value: float) -> None:
    policy, reference = TokenLogProbs(tiny_llama(1), with_entropies=True), TokenLogProbs(tiny_llama(2))

    def barring(*inputs: torch.Tensor) -> tuple[torch.Tensor]:
        """Token 12 alone, which the second response has."""
        ids = inputs[0]
        return (torch.where(ids == 12, value, reference(*inputs).logps),)

    with pytest.raises(
        StageError, match=r"^row 11 of the prompts, response 'text 1': the reference gives its token 12"
    ):
        read_rollouts(EPISODES, [0.0] * 3, policy, barring, None, 1.0, batching(1000, False))
