"""Log-probs without whole-vocabulary logits, against a log-softmax over one unpadded sequence at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from stages.lib.batching import completion_mask, pad_left, pad_right
from stages.lib.token_logprobs import TokenLogProbs, position_ids
from tests.tiny_models import CPU, PAD, tiny_gpt2, tiny_llama

PROMPTS = [[3, 4, 5], [6], [7, 8]]
COMPLETIONS = [[9, 10, 1], [11, 12, 13, 14, 1], [15]]
SEQUENCES = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]


def expected(model: nn.Module, row: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of one row's completion from the model's own logits, alone and unpadded."""
    ids = torch.tensor([SEQUENCES[row]])
    log_probs = torch.log_softmax(model(ids).logits[0, :-1] / temperature, dim=-1)
    log_probs = log_probs[len(PROMPTS[row]) - 1 :]
    entropies = torch.distributions.Categorical(logits=log_probs).entropy()
    return log_probs.gather(-1, torch.tensor(COMPLETIONS[row])[:, None]).squeeze(-1), entropies


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, attention_mask = (pad_left if side == "left" else pad_right)(SEQUENCES, PAD, CPU)
    lengths, totals = [len(prompt) for prompt in PROMPTS], [len(sequence) for sequence in SEQUENCES]
    mask = completion_mask(lengths, totals, ids.shape[1], CPU)
    if side == "left":
        mask = torch.stack([row.roll(ids.shape[1] - total) for row, total in zip(mask, totals, strict=True)])
    return ids, attention_mask, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk_tokens", [2, 4096])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_log_probs_and_entropies_are_those_of_each_sequence_alone(
    make: Callable[[], nn.Module], chunk_tokens: int, side: str
) -> None:
    model = make()
    ids, attention_mask, mask = padded(side)
    module = TokenLogProbs(model, temperature=0.7, chunk_tokens=chunk_tokens, with_entropies=True)
    logps, entropies = module(ids, attention_mask, mask)
    for row in range(len(SEQUENCES)):
        log_probs, entropy = expected(model, row, temperature=0.7)
        assert logps[row][mask[row]].tolist() == pytest.approx(log_probs.tolist(), abs=1e-5)
        assert entropies[row][mask[row]].tolist() == pytest.approx(entropy.tolist(), abs=1e-5)
    assert logps[~mask].count_nonzero() == 0


def test_the_gradient_is_that_of_the_whole_logits() -> None:
    ids, attention_mask, mask = padded("right")
    gradients = []
    for chunk_tokens in (None, 2):
        model = tiny_llama()
        if chunk_tokens is None:
            loss = sum(expected(model, row)[0].sum() for row in range(len(SEQUENCES)))
        else:
            loss = TokenLogProbs(model, chunk_tokens=chunk_tokens)(ids, attention_mask, mask)[0].sum()
        loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-5)


def test_a_batch_without_targets_gives_zeros_and_a_gradient_of_zero() -> None:
    model = tiny_llama()
    ids, attention_mask, mask = padded("right")
    logps, _ = TokenLogProbs(model)(ids, attention_mask, torch.zeros_like(mask))
    logps.sum().backward()
    assert logps.count_nonzero() == 0
    assert model.lm_head.weight.grad.count_nonzero() == 0


def test_positions_count_real_tokens_only() -> None:
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
