"""Which tokens see each other, written out."""

import torch

from stages.lib.models.attention_masks import PARTS, model_mask


def test_a_token_sees_its_own_part_and_the_prompt_before_it() -> None:
    parts = torch.tensor(
        [[1, 2, 2, 3, 3, PARTS + 1, PARTS + 2, 0]]
    )  # a prompt and two replies, another with one, padding
    mask = model_mask(parts, torch.bfloat16)
    assert mask is not None
    assert mask.shape == (1, 1, 8, 8)
    assert mask.dtype == torch.bfloat16
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert mask.unique().tolist() == [torch.finfo(torch.bfloat16).min, 0]


def test_a_mask_of_real_tokens_stays_one() -> None:
    real = torch.tensor([[True, True, False]])
    found = model_mask(real, torch.float32)
    assert found is not None
    assert found.tolist() == [[1, 1, 0]]
    assert model_mask(None, torch.float32) is None
