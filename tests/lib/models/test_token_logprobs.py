"""Log-probs without whole-vocabulary logits, against a log-softmax over one unpadded sequence at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from stages.lib.compute.batching import SequenceBatch
from stages.lib.models.token_logprobs import TokenLogProbs
from tests.tiny_models import batching, tiny_gpt2, tiny_llama

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


def batch_of(packing: bool) -> SequenceBatch:
    (batch,) = batching(1000, packing).sequences(PROMPTS, COMPLETIONS)
    return batch


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("chunk_tokens", [2, 4096])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_probs_and_entropies_are_those_of_each_sequence_alone(
    make: Callable[[], nn.Module], chunk_tokens: int, packing: bool, attention: str
) -> None:
    model = make()
    model.set_attn_implementation(attention)
    batch = batch_of(packing)
    module = TokenLogProbs(model, chunk_tokens=chunk_tokens, with_entropies=True)
    found = module(*batch.inputs, batch.completion_mask, 0.7)
    with torch.no_grad():
        entropies = batch.on_completions(module(*batch.inputs, batch.completion_mask, 0.7).entropies)
    logps = batch.on_completions(found.logps)
    for place, row in enumerate(batch.rows):
        log_probs, entropy = expected(model, row, temperature=0.7)
        length = len(COMPLETIONS[row])
        assert logps[place][:length].tolist() == pytest.approx(log_probs.tolist(), abs=1e-5)
        assert entropies[place][:length].tolist() == pytest.approx(entropy.tolist(), abs=1e-5)
    assert found.logps[~batch.completion_mask].count_nonzero() == 0


@pytest.mark.parametrize("packing", [False, True])
def test_the_gradient_is_that_of_the_whole_logits(packing: bool) -> None:
    batch = batch_of(packing)
    gradients = []
    for chunk_tokens in (None, 2):
        model = tiny_llama()
        if chunk_tokens is None:
            loss = sum(expected(model, row)[0].sum() for row in range(len(SEQUENCES)))
        else:
            loss = TokenLogProbs(model, chunk_tokens=chunk_tokens)(*batch.inputs, batch.completion_mask)[0].sum()
        loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-5)


def test_a_batch_without_targets_gives_zeros_and_a_gradient_of_zero() -> None:
    model = tiny_llama()
    batch = batch_of(packing=False)
    logps, _ = TokenLogProbs(model)(*batch.inputs, torch.zeros_like(batch.completion_mask))
    logps.sum().backward()
    assert logps.count_nonzero() == 0
    assert all(weight.grad is not None and weight.grad.count_nonzero() == 0 for weight in model.parameters())


@pytest.mark.parametrize("chunk_tokens", [2, 4096])
def test_details_are_those_of_whole_distributions_and_leave_the_gradient_alone(chunk_tokens: int) -> None:
    batch = batch_of(packing=False)
    gradients = []
    for run in ("log_probs", "details"):
        model = tiny_llama()
        found = TokenLogProbs(model, chunk_tokens=chunk_tokens)(*batch.inputs, batch.completion_mask, run=run)
        found.logps.sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.equal(*gradients)
    columns = [batch.on_completions(column.detach()) for column in found]
    for place, row in enumerate(batch.rows):
        logits = model(torch.tensor([SEQUENCES[row]])).logits[0, len(PROMPTS[row]) - 1 : -1]
        probs = torch.softmax(logits, dim=-1)
        log_probs, entropies = expected(model, row)
        for column, wanted in zip(
            columns, (log_probs, entropies, logits.mean(dim=-1), (probs**2).sum(dim=-1).log()), strict=True
        ):
            assert column[place][: len(COMPLETIONS[row])].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
