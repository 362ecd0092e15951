"""Sampling: the distribution, its end at EOS, and that a response does not depend on the batch it is in."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import Prompt
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.samplers.own import OwnSampler
from tests.tiny_models import CPU, EOS, PAD, tiny_gpt2, tiny_llama

PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10], [11, 12, 13]]


def sampler(model: nn.Module, size: int = 4, **changed: Any) -> OwnSampler:
    options = {"seed": 5, "temperature": 1.0, "max_new_tokens": 12, "eos_id": EOS, "pad_id": PAD, "decode": str}
    options |= {"budget": MemoryBudget("generation_batch_size", size), "processes": Processes(0, 1, CPU)}
    return OwnSampler(TokenLogProbs(model), model, **(options | {"by_row": True} | changed))


def prompts_of(ids: list[list[int]], rows: list[int]) -> list[Prompt]:
    return [Prompt(row, own, [], {}) for own, row in zip(ids, rows, strict=True)]


def sample(
    model: nn.Module, ids: list[list[int]], rows: list[int], samples: int = 1, **changed: Any
) -> list[list[int]]:
    episodes = sampler(model, **changed).sample(prompts_of(ids, rows), 2, samples)
    return [episode.ids for episode in episodes]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_response_does_not_depend_on_its_batch(make: Callable[[], nn.Module]) -> None:
    model = make()
    together = sample(model, PROMPTS, [0, 1, 2, 3])
    alone = [sample(model, [prompt], [row])[0] for row, prompt in enumerate(PROMPTS)]
    backwards = sample(model, PROMPTS[::-1], [3, 2, 1, 0], size=3)[::-1]
    assert together == alone == backwards
    assert len({tuple(response) for response in together}) > 1
    assert model.training  # as it was


def test_a_prompt_has_as_many_samples_as_wanted_and_they_differ() -> None:
    model = tiny_llama()
    single, several = sample(model, PROMPTS, [0, 1, 2, 3]), sample(model, PROMPTS, [0, 1, 2, 3], samples=3, size=5)
    assert several[::3] == single  # the first of each draws what it draws alone
    assert len({tuple(response) for response in several[:3]}) == 3
    episodes = sampler(model).sample(prompts_of(PROMPTS, [0, 1, 2, 3]), 2, 3)
    assert [(episode.prompt.row, episode.sample) for episode in episodes[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_a_prompt_that_comes_twice_is_answered_twice_unless_by_row() -> None:
    """A phase may span two epochs, and with them hold a row twice."""
    model = tiny_llama()
    first, second = sample(model, [[3, 4]] * 2, [7, 7], by_row=False)
    assert first != second
    first, second = sample(model, [[3, 4]] * 2, [7, 7], by_row=True)
    assert first == second


def test_greedy_responses_are_those_of_generate() -> None:
    model = tiny_llama().eval()
    for row, prompt in enumerate(PROMPTS):
        (ours,) = sample(model, [prompt], [row], temperature=0)
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
        assert ours == theirs


def test_a_response_ends_with_its_first_eos() -> None:
    episodes = sampler(tiny_llama(), max_new_tokens=30).sample(prompts_of(PROMPTS * 8, list(range(32))), 2)
    responses = [episode.ids for episode in episodes]
    assert any(episode.ended for episode in episodes)
    for episode in episodes:
        assert episode.ended == (EOS in episode.ids)
        assert len(episode.ids) == (episode.ids.index(EOS) + 1 if episode.ended else 30)
        assert episode.text == str(episode.ids)
        assert episode.policy_mask == [True] * len(episode.ids)
    assert not all(EOS in response for response in responses)


def test_tokens_come_as_often_as_the_distribution_says() -> None:
    model = tiny_llama()
    count = 4000
    first = [response[0] for response in sample(model, [[3, 4]] * count, list(range(count)), max_new_tokens=1)]
    with torch.no_grad():
        probabilities = torch.softmax(model(torch.tensor([[3, 4]])).logits[0, -1], dim=-1)
    frequencies = Counter(first)
    for token, probability in enumerate(probabilities.tolist()):
        deviation = (probability * (1 - probability) / count) ** 0.5
        assert abs(frequencies[token] / count - probability) < 4.5 * deviation + 1e-9
