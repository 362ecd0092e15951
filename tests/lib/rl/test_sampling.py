"""Sampling: the distribution, its end at EOS, and that a response does not depend on the batch it is in."""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from stages.lib.command.errors import StageError
from stages.lib.compute.processes import Processes
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.sampling import invert_distribution, positions_of, require_room, sample_responses, uniform_draws
from tests.tiny_models import CPU, EOS, PAD, tiny_gpt2, tiny_llama

PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10], [11, 12, 13]]


def sample(model: nn.Module, prompts: list[list[int]], rows: list[int], **changed: Any) -> list[list[int]]:
    options = {"seed": 5, "step": 2, "temperature": 1.0, "max_new_tokens": 12, "batch_size": 4}
    alone = Processes(0, 1, CPU)
    ids = {"eos_id": EOS, "pad_id": PAD}
    options |= changed
    return sample_responses(TokenLogProbs(model), prompts, rows, config=model.config, processes=alone, **ids, **options)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_response_does_not_depend_on_its_batch(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    together = sample(model, PROMPTS, [0, 1, 2, 3])
    alone = [sample(model, [prompt], [row])[0] for row, prompt in enumerate(PROMPTS)]
    backwards = sample(model, PROMPTS[::-1], [3, 2, 1, 0], batch_size=3)[::-1]
    assert together == alone == backwards
    assert len({tuple(response) for response in together}) > 1


def test_greedy_responses_are_those_of_generate() -> None:
    model = tiny_llama().eval()
    for row, prompt in enumerate(PROMPTS):
        (ours,) = sample(model, [prompt], [row], temperature=0)
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
        assert ours == theirs


def test_a_response_ends_with_its_first_eos() -> None:
    responses = sample(tiny_llama().eval(), PROMPTS * 8, list(range(32)), max_new_tokens=30)
    ended = [response for response in responses if EOS in response]
    assert ended
    assert all(response.index(EOS) == len(response) - 1 for response in ended)
    assert all(len(response) == 30 for response in responses if EOS not in response)


def test_tokens_come_as_often_as_the_distribution_says() -> None:
    model = tiny_llama().eval()
    count = 4000
    first = [response[0] for response in sample(model, [[3, 4]] * count, list(range(count)), max_new_tokens=1)]
    with torch.no_grad():
        probabilities = torch.softmax(model(torch.tensor([[3, 4]])).logits[0, -1], dim=-1)
    frequencies = Counter(first)
    for token, probability in enumerate(probabilities.tolist()):
        deviation = (probability * (1 - probability) / count) ** 0.5
        assert abs(frequencies[token] / count - probability) < 4.5 * deviation + 1e-9


def test_temperature_sharpens_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0]]).expand(5, 2)
    uniform = torch.tensor([0.0, 0.11, 0.13, 0.26, 0.28])
    # P(token 0) is 1 / (1 + e) = 0.269 at temperature 1 and 1 / (1 + e²) = 0.119 at temperature 0.5.
    assert invert_distribution(logits, uniform, 1.0).tolist() == [0, 0, 0, 0, 1]
    assert invert_distribution(logits, uniform, 0.5).tolist() == [0, 0, 1, 1, 1]
    assert invert_distribution(logits, uniform, 0.0).tolist() == [1, 1, 1, 1, 1]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    for draw in (0.0, 0.5, 1.0 - 2**-53):
        assert invert_distribution(logits, torch.tensor([draw], dtype=torch.float64), 1.0).tolist() == [1]


def test_draws_belong_to_seed_step_and_row() -> None:
    draws = uniform_draws(1, 2, 3, 5)
    assert ((draws >= 0) & (draws < 1)).all()
    assert draws[:3].tolist() == uniform_draws(1, 2, 3, 3).tolist()
    others = [uniform_draws(*key, 5)[0] for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2))]
    assert len({draws[0], *others}) == 5


def test_a_prompt_whose_response_may_not_fit_is_refused() -> None:
    config = tiny_llama().config  # 64 positions
    require_room([[3] * 40, [3] * 2], config, 24, "tokens")
    with pytest.raises(StageError, match=r"^tokens: the longest prompt has 41 tokens, and 24 new ones"):
        require_room([[3] * 2, [3] * 41], config, 24, "tokens")
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 30}
    config = SimpleNamespace(to_dict=lambda: {"max_position_embeddings": 64, "rope_parameters": longrope})
    with pytest.raises(StageError, match="more than the model's 30 positions"):
        require_room([[3] * 8], config, 24, "tokens")


def test_positions_count_real_tokens_only() -> None:
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
