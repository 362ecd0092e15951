"""Supervised fine-tuning: losses and metrics worked out from a model's own logits, and NEFTune's noise."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stages.lib.compute.processes import Processes
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.objectives.embedding_noise import EmbeddingNoise
from stages.lib.objectives.fit import global_means
from stages.lib.objectives.objective import Mean, PassSums
from stages.lib.objectives.sft import SftObjective, dft, perplexity
from tests.tiny_models import CPU, batching, tiny_gpt2, tiny_llama

ROWS = {
    "input_ids": [[3, 4, 5, 9, 10, 1], [6, 7], [8, 11, 12, 13, 14, 15, 1], [6, 7, 7]],
    "loss_mask": [[False, False, False, True, True, True], [False, True], [False] + [True] * 6, [False, True, False]],
}
CUTS = pytest.mark.parametrize(
    ("tokens", "packing"), [(1, False), (14, False), (14, True), (1000, False), (1000, True)]
)
ALPHA, SEED = 5.0, 17


class Trainer:
    """As an engine: it counts steps, and its gradients are the module's."""

    def __init__(self, module: nn.Module, steps_taken: int = 0) -> None:
        self.module = module
        self.steps_taken = steps_taken

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def gradient(self) -> torch.Tensor:
        return torch.cat([weight.grad.flatten() for weight in self.module.parameters()])


def worked_out(model: nn.Module) -> dict[str, list[float]]:
    """Of each trained token, from the logits of its row alone, in float64: −log π, π, entropy, and whether it leads."""
    values: dict[str, list[float]] = {"nats": [], "probability": [], "entropy": [], "leads": []}
    for ids, mask in zip(ROWS["input_ids"], ROWS["loss_mask"], strict=True):
        logits = model(torch.tensor([ids])).logits[0].detach().double().numpy()
        for place in (place for place, trained in enumerate(mask) if trained):
            probabilities = np.exp(logits[place - 1]) / np.exp(logits[place - 1]).sum()
            own = probabilities[ids[place]]
            values["nats"].append(-math.log(own))
            values["probability"].append(own)
            values["entropy"].append(-float((probabilities * np.log(probabilities)).sum()))
            values["leads"].append(float(own == probabilities.max()))
    return values


@CUTS
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("train", [False, True])
def test_every_metric_is_a_mean_over_tokens(
    make: Callable[[], nn.Module], tokens: int, packing: bool, train: bool
) -> None:
    model = make()
    expected = {name: sum(values) / len(values) for name, values in worked_out(model).items()}
    assert make is tiny_gpt2 or 0 < expected["leads"] < 1  # of GPT-2's few guesses none is right
    objective = SftObjective(batching(tokens, packing))
    found = global_means(objective, Trainer(TokenLogProbs(model, chunk_tokens=3)), ROWS, train=train)
    assert found == pytest.approx(
        {
            "loss": expected["nats"],
            "perplexity": math.exp(expected["nats"]),
            "entropy": expected["entropy"],
            "token_accuracy": expected["leads"],
        },
        rel=1e-5,
    )
    assert objective.units(ROWS) == 18


@CUTS
def test_dft_weights_each_token_with_its_probability(tokens: int, packing: bool) -> None:
    model = tiny_llama()
    values = worked_out(model)
    pairs = list(zip(values["probability"], values["nats"], strict=True))
    trainer = Trainer(TokenLogProbs(model))
    found = global_means(SftObjective(batching(tokens, packing), "dft"), trainer, ROWS, train=True)
    assert found["loss"] == pytest.approx(sum(p * nats for p, nats in pairs) / len(pairs), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(values["nats"]) / len(pairs)), rel=1e-5)
    # −π ∇ log π is −∇π: the gradient of minus the mean probability.
    gradient = trainer.gradient()
    model.zero_grad()
    total = torch.zeros(())
    for ids, mask in zip(ROWS["input_ids"], ROWS["loss_mask"], strict=True):
        probabilities = torch.softmax(model(torch.tensor([ids])).logits[0, :-1], dim=-1)
        total = total - sum(probabilities[place, ids[place + 1]] for place in range(len(ids) - 1) if mask[place + 1])
    (total / len(pairs)).backward()
    assert torch.allclose(gradient, trainer.gradient(), atol=1e-6)


def test_dft_by_hand() -> None:
    logps = torch.tensor([math.log(0.5), math.log(0.25), 0.0, -200.0], requires_grad=True)
    losses = dft(logps)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.5 * math.log(2), 0.25 * math.log(4), 0.0, 0.0])
    assert logps.grad.tolist() == pytest.approx([-0.5, -0.25, -1.0, 0.0])


def test_a_perplexity_beyond_all_bounds_is_still_a_number() -> None:
    assert perplexity(1.5) == math.exp(1.5)
    assert perplexity(1e6) == math.exp(200)


class Several(SftObjective):
    """Beside the loss a mean over rows, and one over nothing."""

    def __init__(self, tokens: int) -> None:
        super().__init__(batching(tokens))
        object.__setattr__(self, "metrics", {"loss": Mean("tokens"), "one": Mean("rows"), "none": Mean("kept")})

    def sums(self, module: Any, batch: Any, rows: Any) -> PassSums:
        loss, metrics = super().sums(module, batch, rows)
        return PassSums(loss, torch.stack([metrics[0], torch.tensor(float(len(batch.rows))), torch.tensor(0.0)]))

    def denominators(self, rows: Any) -> dict[str, int]:
        return {**super().denominators(rows), "rows": len(rows["input_ids"]), "kept": 0}


@pytest.mark.parametrize("tokens", [1, 1000])
def test_a_metric_has_a_denominator_of_its_own_and_none_without_one(tokens: int) -> None:
    module = TokenLogProbs(tiny_llama())
    loss = global_means(SftObjective(batching(1000)), module, ROWS, train=False)["loss"]
    assert global_means(Several(tokens), module, ROWS, train=False) == pytest.approx({"loss": loss, "one": 1.0})


def noise_of(model: nn.Module, alpha: float = ALPHA, seed: int = SEED) -> EmbeddingNoise:
    return EmbeddingNoise(model.get_input_embeddings(), alpha, seed)


@pytest.mark.parametrize("length", [2, 500])
def test_noise_is_uniform_and_scaled_by_the_length_of_its_own_row(length: int) -> None:
    noise = noise_of(tiny_llama()).of_row(3, 1, length, 64)
    bound = ALPHA / math.sqrt(length * 64)
    assert noise.shape == (length, 64)
    assert float(noise.abs().max()) <= bound
    assert float(noise.abs().max()) > 0.95 * bound
    count = length * 64  # a uniform draw in ±b has variance b² / 3, and its square b⁴ (1/5 - 1/9)
    assert float(noise.mean()) == pytest.approx(0, abs=4 * bound / math.sqrt(3 * count))
    assert float((noise**2).mean()) == pytest.approx(bound**2 / 3, abs=4 * bound**2 * math.sqrt(4 / 45 / count))


def test_noise_belongs_to_seed_step_and_row() -> None:
    model = tiny_llama()
    own = noise_of(model).of_row(3, 1, 5, 16)
    assert torch.equal(own, noise_of(model).of_row(3, 1, 5, 16))
    for other in (
        noise_of(model, seed=18).of_row(3, 1, 5, 16),
        noise_of(model).of_row(4, 1, 5, 16),
        noise_of(model).of_row(3, 2, 5, 16),
    ):
        assert float((own - other).abs().max()) > 0.1


@CUTS
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_noisy_step_is_that_of_noisy_embeddings_however_rows_are_cut(
    make: Callable[[], nn.Module], tokens: int, packing: bool
) -> None:
    model = make()
    trainer = Trainer(TokenLogProbs(model), steps_taken=3)
    objective = SftObjective(batching(tokens, packing), noise=noise_of(model))
    found = global_means(objective, trainer, ROWS, train=True)["loss"]
    gradient = trainer.gradient()
    model.zero_grad()
    total = torch.zeros(())
    for place, (ids, mask) in enumerate(zip(ROWS["input_ids"], ROWS["loss_mask"], strict=True)):
        embeddings = model.get_input_embeddings()(torch.tensor([ids]))
        noise = noise_of(model).of_row(3, place, len(ids), embeddings.shape[-1])
        logps = torch.log_softmax(model(inputs_embeds=embeddings + noise).logits[0, :-1], dim=-1)
        total = total - sum(logps[at, ids[at + 1]] for at in range(len(ids) - 1) if mask[at + 1])
    (total / 11).backward()
    assert found == pytest.approx(total.item() / 11, rel=1e-5)
    assert torch.allclose(gradient, trainer.gradient(), atol=1e-5)
    without = global_means(SftObjective(batching(tokens, packing)), trainer, ROWS, train=True)["loss"]
    assert abs(found - without) > 0.001
    # Evaluation is free of noise.
    assert global_means(objective, trainer, ROWS, train=False)["loss"] == pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_noise_is_the_same_on_two_processes(packing: bool) -> None:
    model = tiny_llama()
    trainer = Trainer(TokenLogProbs(model), steps_taken=3)

    def sums(rank: int, world_size: int, tokens: int) -> torch.Tensor:
        plan = batching(tokens, packing, processes=Processes(rank, world_size, CPU))
        objective = SftObjective(plan, noise=noise_of(model))
        return sum(objective.sums(trainer, batch, ROWS).metrics for batch in objective.batches(ROWS))

    assert (sums(0, 2, 8) + sums(1, 2, 8)).tolist() == pytest.approx(sums(0, 1, 1000).tolist(), rel=1e-5)


WHOLE_TEXTS = {
    "input_ids": [[3, 4, 5, 9, 10, 1], [6, 7], [8, 11, 12, 13, 14, 15, 1]],
    "loss_mask": [[False] + [True] * (length - 1) for length in (6, 2, 7)],
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_whole_texts_in_one_row_see_nothing_of_each_other(make: Callable[[], nn.Module], attention: str) -> None:
    model = make().double()
    model.set_attn_implementation(attention)
    module = TokenLogProbs(model)
    (batch,) = batching(1000, packing=True).masked(WHOLE_TEXTS["input_ids"], WHOLE_TEXTS["loss_mask"])
    assert (batch.rows, batch.input_ids.shape) == ([2, 0, 1], (1, 15))
    changed = batch.input_ids.clone()
    changed[0, 7:13] = 20  # the text in the middle
    logps, others = (
        batch.on_completions(module(ids, *batch.inputs[1:], batch.completion_mask)[0])
        for ids in (batch.input_ids, changed)
    )
    moved = (logps - others).abs().amax(dim=-1).tolist()
    assert [moved[0], moved[2]] == [0, 0]
    assert moved[1] > 0.1
    # No token is predicted from the text before it: a text has one target fewer than tokens.
    losses = []
    for packing in (False, True):
        model.zero_grad()
        trainer = Trainer(module)
        found = global_means(SftObjective(batching(1000, packing)), trainer, WHOLE_TEXTS, train=True)
        losses.append((found["loss"], trainer.gradient()))
    rounding = 1e-12 if attention == "sdpa" else 1e-6  # transformers' eager softmax is in float32
    assert losses[0][0] == pytest.approx(losses[1][0], rel=rounding)
    assert float((losses[0][1] - losses[1][1]).norm() / losses[0][1].norm()) < 100 * rounding
    assert SftObjective(batching(1)).denominators(WHOLE_TEXTS) == {"tokens": 15 - 3}
