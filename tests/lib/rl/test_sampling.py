"""Random numbers of a response, and the tokens that they draw."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.lib.command.errors import StageError
from stages.lib.rl.held_out import STEP as HELD_OUT
from stages.lib.rl.sampling import invert_distribution, likeliest, positions_of, require_room, uniform_draws
from tests.tiny_models import tiny_llama


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


def test_the_likeliest_tokens_are_kept() -> None:
    weights = torch.tensor([[1.0, 4.0, 2.0, 2.0, 1.0], [0.0, 0.0, 5.0, 0.0, 0.0]])
    assert likeliest(weights, 3, 1.0).tolist() == [[0, 4, 2, 2, 0], [0, 0, 5, 0, 0]]
    assert likeliest(weights, 2, 1.0).tolist()[0] == [0, 4, 2, 0, 0]  # of equals the first
    assert likeliest(weights, 9, 1.0).tolist() == weights.tolist()
    # Shares 0.4, 0.2, 0.2, 0.1, 0.1: 0.6 is reached by two tokens, anything above it needs a third one.
    assert likeliest(weights, None, 0.6).tolist()[0] == [0, 4, 2, 0, 0]
    assert likeliest(weights, None, 0.61).tolist() == [[0, 4, 2, 2, 0], [0, 0, 5, 0, 0]]
    assert likeliest(weights, None, 1e-9).tolist() == [[0, 4, 0, 0, 0], [0, 0, 5, 0, 0]]
    assert likeliest(weights, 3, 0.5).tolist()[0] == [0, 4, 0, 0, 0]  # of the 8 that top_k leaves


def test_draws_are_among_the_likeliest() -> None:
    logits, uniform = torch.tensor([[1.0, 4.0, 2.0, 2.0, 1.0]]).log().expand(4, 5), torch.tensor([0.0, 0.6, 0.7, 0.999])
    assert invert_distribution(logits, uniform, 1.0, top_k=2).tolist() == [1, 1, 2, 2]  # 4 and 2 of 6
    assert invert_distribution(logits, uniform, 1.0, top_p=0.5).tolist() == [1, 1, 2, 2]
    assert invert_distribution(logits, uniform, 1.0, top_k=1).tolist() == [1, 1, 1, 1]


def test_draws_belong_to_seed_step_row_and_sample() -> None:
    draws = uniform_draws(1, 2, 3, 5)
    assert ((draws >= 0) & (draws < 1)).all()
    assert draws[:3].tolist() == uniform_draws(1, 2, 3, 3).tolist()
    others = [uniform_draws(*key, 5)[0] for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2))]
    others += [uniform_draws(1, 2, 3, 5, sample)[0] for sample in (1, 2)]
    assert len({draws[0], *others}) == 7


def test_draws_of_evaluations_belong_to_a_row_too() -> None:
    """Their step is the largest; beyond 2^63 the numbers of which a key is made are rounded by whoever is careless."""
    assert HELD_OUT > 2**30
    for step in (HELD_OUT, 2**32 - 1):
        assert len({uniform_draws(17, step, row, 1)[0] for row in range(50)}) == 50


def test_the_first_sample_draws_what_a_single_one_always_has() -> None:
    """Rollouts of earlier versions come out again."""
    key = [17, (4 << 32) + 9]
    expected = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1])).random(8)
    assert uniform_draws(17, 4, 9, 8, sample=0).tolist() == expected.tolist()


def test_no_draw_of_a_sample_comes_again_in_another_one() -> None:
    """Not within the most new tokens that settings may ask for: a counter in the wrong order would shift by a few."""
    longest = 2**20
    first, *others = (uniform_draws(5, 1, 0, longest, sample) for sample in (0, 1, 2, 3))
    for other in others:  # of 2^53 values two lists of 2^20 have one in common once in 8,000 times
        assert len(np.intersect1d(first, other)) == 0


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
