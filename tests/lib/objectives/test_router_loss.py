"""The load-balancing loss against NumPy, finite differences, and itself under other micro-batches and packing."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stages.lib.command.errors import StageError
from stages.lib.models.routing import Routing, recorded_routing
from stages.lib.models.scalar_scores import SequenceScores
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.objectives.embedding_noise import EmbeddingNoise
from stages.lib.objectives.fit import global_means
from stages.lib.objectives.objective import Objective
from stages.lib.objectives.preference import PreferenceObjective
from stages.lib.objectives.reward import RewardObjective
from stages.lib.objectives.router_loss import expert_loads, largest_shares, load_balancing_losses, with_router_loss
from stages.lib.objectives.sft import SftObjective
from stages.lib.settings.declaration import block
from stages.lib.settings.preference_loss import SigmoidLoss
from stages.lib.settings.reward_loss import PairwiseLoss
from stages.lib.settings.router_loss import RouterLoss
from stages.lib.settings.runtime import PassCost
from tests.tiny_experts import (
    CHOSEN,
    EXPERTS,
    tiny_mixtral,
    tiny_mixtral_classifier,
    tiny_olmoe,
    tiny_qwen2_moe,
    tiny_qwen3_moe,
)
from tests.tiny_models import batching, tiny_llama

SFT_ROWS = {
    "input_ids": [[3, 4, 5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17, 18, 19], [20, 21, 3, 5]],
    "loss_mask": [[0, 0, 1, 1, 1, 1], [0, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1]],
}
PAIRS = {
    "prompt_ids": [[3, 4, 5], [6], [7, 8]],
    "chosen_ids": [[9, 10], [11, 12, 13, 1], [14, 1]],
    "rejected_ids": [[15], [16, 1], [17, 18, 19, 20, 21, 1]],
    "margin": [0.0, 0.0, 0.0],
    "reference_chosen_logps": [-9.0, -13.0, -8.0],
    "reference_rejected_logps": [-4.0, -8.0, -19.0],
}
CUTS = pytest.mark.parametrize(("tokens", "packing"), [(1, False), (12, False), (9, True)])
OVER = pytest.mark.parametrize("over", ["sequence", "batch"])


def settings(over: str, coefficient: float = 0.5) -> RouterLoss:
    return RouterLoss(coefficient=coefficient, over=over)


class Alone(nn.Module):
    """A module as the only part of an engine."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def routed(
    kind: str, over: str, tokens: int = 100, packing: bool = False, sharing: bool = False
) -> tuple[Objective, Alone, dict[str, list], nn.Module]:
    """An objective, its module, rows for it, and the model."""
    cut = batching(tokens, packing)
    if sharing:
        cut = replace(cut, cost=PassCost(overhead=3, attention=10**9), longest_shared=1000)
    if kind == "rm":
        model: Any = tiny_mixtral_classifier()
        objective, module, rows, each = (
            RewardObjective(cut, PairwiseLoss(**block(PairwiseLoss))),
            SequenceScores(model),
            PAIRS,
            2,
        )
    elif kind == "dpo":
        model = tiny_mixtral()
        loss = SigmoidLoss(**block(SigmoidLoss))
        objective, module, rows, each = PreferenceObjective(cut, loss), TokenLogProbs(model), PAIRS, 2
    else:
        model = tiny_olmoe()
        objective, module, rows, each = SftObjective(cut), TokenLogProbs(model), SFT_ROWS, 1
    return with_router_loss(objective, settings(over), model, each, "train.x"), Alone(module), rows, model


def in_numpy(logits: np.ndarray, chosen: int) -> tuple[float, float]:
    """B and the largest share of one set of tokens: logits (layers, tokens, experts), in float64, expert by expert."""
    losses, shares = [], []
    for layer in logits.astype(np.float64):
        experts = layer.shape[1]
        total, loads = 0.0, []
        picked = np.argsort(-layer, axis=1, kind="stable")[:, :chosen]
        gates = np.exp(layer - layer.max(axis=1, keepdims=True))
        gates /= gates.sum(axis=1, keepdims=True)
        for expert in range(experts):
            frequency = np.mean([expert in row for row in picked])
            loads.append(frequency)
            total += frequency * gates[:, expert].mean()
        losses.append(experts * total)
        shares.append(max(loads) / sum(loads))
    return float(np.mean(losses)), float(np.mean(shares))


@lru_cache
def in_one_pass(kind: str, over: str) -> tuple[dict[str, float], list[torch.Tensor | None]]:
    """Means and gradients."""
    objective, module, rows, model = routed(kind, over)
    return global_means(objective, module, rows, train=True), [weight.grad for weight in model.parameters()]


@lru_cache
def of_whole(kind: str, over: str) -> tuple[float, float]:
    """B and share from the logits that transformers gives for one sequence at a time, by NumPy."""
    *_, rows, model = routed(kind, over)
    if kind == "sft":
        sequences = rows["input_ids"]
    else:
        pairs = zip(rows["prompt_ids"] * 2, rows["chosen_ids"] + rows["rejected_ids"], strict=True)
        sequences = [prompt + reply for prompt, reply in pairs]
    found = []
    with torch.no_grad():
        for ids in sequences:
            output = model.base_model(input_ids=torch.tensor([ids]), output_router_logits=True)
            found.append(np.stack([logits.numpy() for logits in output.router_logits]))
    if over == "batch":
        found = [np.concatenate(found, axis=1)]
    both = [in_numpy(logits, CHOSEN) for logits in found]
    return tuple(np.mean(both, axis=0))


def test_four_micro_batches_would_give_2_80_where_the_batch_gives_2() -> None:
    """Four parts of two tokens, each fond of two of four experts, which are others in the next part."""
    gates = torch.tensor([[0.35, 0.35, 0.15, 0.15], [0.15, 0.15, 0.35, 0.35]], dtype=torch.float64).log()
    logits = torch.cat([gates[part % 2].expand(2, 4) for part in range(4)])
    routing = [Routing(logits, logits.topk(2).indices)]
    parts = torch.eye(4, dtype=torch.bool).repeat_interleave(2, dim=1)
    # In a part f is 1, 1, 0, 0 and P 0.35, 0.35, 0.15, 0.15; over all of them 0.5 and 0.25 for each expert.
    of_parts = load_balancing_losses(expert_loads(routing, parts))
    assert of_parts.mean().item() == pytest.approx(2.80)  # 4 · (0.35 + 0.35)
    whole = expert_loads(routing, torch.ones(1, 8, dtype=torch.bool))
    assert load_balancing_losses(whole).tolist() == pytest.approx([2.0])  # 4 · 4 · 0.5 · 0.25
    assert largest_shares(whole.counts).tolist() == [0.25]
    assert largest_shares(expert_loads(routing, parts).counts).tolist() == [0.5] * 4


def test_the_loss_is_that_of_numpy_and_its_gradient_that_of_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    layers, tokens, chosen = 3, 10, 2
    logits = (2 * torch.randn(layers, tokens, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    members = torch.zeros(2, tokens, dtype=torch.bool)
    members[0, :4], members[1, 5:] = True, True  # the fifth is padding
    picked = logits.detach().topk(chosen).indices

    def losses(values: torch.Tensor) -> torch.Tensor:
        routings = [Routing(*of_layer) for of_layer in zip(values, picked, strict=True)]
        return load_balancing_losses(expert_loads(routings, members))

    found = losses(logits)
    expected = [in_numpy(logits.detach().numpy()[:, places], chosen)[0] for places in (slice(4), slice(5, None))]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    (found @ weights).backward()
    assert logits.grad is not None
    for place in [(0, 0, 0), (1, 2, 4), (2, 9, 1), (0, 4, 3)]:
        ends = []
        for step in (1e-6, -1e-6):
            moved = logits.detach().clone()
            moved[place] += step
            ends.append(float(losses(moved) @ weights))
        assert logits.grad[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-9)
    assert torch.all(logits.grad[:, 4] == 0)


@OVER
@CUTS
@pytest.mark.parametrize("kind", ["sft", "rm", "dpo"])
def test_metrics_and_gradients_do_not_depend_on_how_rows_are_cut(
    kind: str, over: str, tokens: int, packing: bool
) -> None:
    require_whole(kind, over, *routed(kind, over, tokens, packing))


@OVER
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["rm", "dpo"])
def test_a_shared_prompt_counts_for_both_of_its_sequences(kind: str, over: str, packing: bool) -> None:
    objective, module, rows, model = routed(kind, over, tokens=24, packing=packing, sharing=True)
    assert any(batch.end_mask.dtype != torch.bool for batch in objective.batches(rows))
    require_whole(kind, over, objective, module, rows, model)


def require_whole(kind: str, over: str, objective: Objective, module: Alone, rows: dict, model: nn.Module) -> None:
    """Metrics as of NumPy; they and the gradients as of one pass over padded sequences."""
    means = global_means(objective, module, rows, train=True)
    assert (means["router_loss"], means["most_loaded_expert"]) == pytest.approx(of_whole(kind, over), rel=1e-5)
    assert global_means(objective, module, rows, train=False) == pytest.approx(means, rel=1e-5)
    whole, gradients = in_one_pass(kind, over)
    assert means == pytest.approx(whole, rel=1e-4)
    for (name, weight), gradient in zip(model.named_parameters(), gradients, strict=True):
        if gradient is not None:
            assert torch.allclose(weight.grad, gradient, atol=1e-5 * float(gradient.norm()) + 1e-7), name


@OVER
def test_the_gradient_is_that_of_the_two_losses(over: str) -> None:
    """With one layer, whose router sees what no gate has touched, the router's logits are smooth in float64."""
    ids, masks = SFT_ROWS["input_ids"], SFT_ROWS["loss_mask"]

    def model_with(change: float) -> Any:
        model = tiny_olmoe(num_hidden_layers=1).double()
        with torch.no_grad():
            model.model.layers[0].mlp.gate.weight[1, 3] += change
        return model

    def trained(coefficient: float | None, change: float = 0.0) -> tuple[Any, dict[str, float]]:
        model = model_with(change)
        asked = None if coefficient is None else settings(over, coefficient)
        objective = with_router_loss(SftObjective(batching(8)), asked, model, 1, "train_sft.sft")
        means = global_means(objective, Alone(TokenLogProbs(model)), {"input_ids": ids, "loss_mask": masks}, train=True)
        return model.model.layers[0].mlp.gate.weight.grad[1, 3].item(), means

    plain, without = trained(None)
    both, means = trained(0.5)
    assert means["loss"] == pytest.approx(without["loss"], abs=1e-12)  # the stage's own, as ever
    slope = (trained(0.5, 1e-6)[1]["router_loss"] - trained(0.5, -1e-6)[1]["router_loss"]) / 2e-6
    assert abs(slope) > 1e-3
    assert both - plain == pytest.approx(0.5 * slope, rel=1e-4)


@pytest.mark.parametrize("train", [True, False])
def test_choices_of_a_step_are_counted_under_the_noise_that_is_trained_on(*, train: bool) -> None:
    """Of a single row, the step's balance is that of its sequence, which is read in the training pass itself."""
    rows = {name: values[:1] for name, values in SFT_ROWS.items()}
    found = []
    for over in ("sequence", "batch"):
        model = tiny_olmoe()
        noise = EmbeddingNoise(model.get_input_embeddings(), 500.0, seed=1)
        objective = with_router_loss(SftObjective(batching(100), noise=noise), settings(over), model, 1, "train.x")
        module = Alone(TokenLogProbs(model))
        module.steps_taken = 3
        found.append(global_means(objective, module, rows, train=train))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    objective, module, *_ = routed("sft", "sequence")
    without = global_means(objective, module, rows, train=False)
    assert (found[0]["router_loss"] == pytest.approx(without["router_loss"], rel=1e-6)) != train


@pytest.mark.parametrize(
    ("make", "layers"), [(tiny_olmoe, 2), (tiny_mixtral, 2), (tiny_qwen2_moe, 2), (tiny_qwen3_moe, 1)]
)
def test_routers_of_several_families_are_recorded(make: Callable[[], Any], layers: int) -> None:
    model = make()
    ids = torch.tensor([[3, 4, 5, 6]])
    theirs = model.base_model(input_ids=ids, output_router_logits=True).router_logits
    with recorded_routing(model) as routings:
        model(input_ids=ids)
    assert [routing.logits.shape for routing in routings] == [(4, EXPERTS)] * layers
    for routing, logits in zip(routings, theirs, strict=True):
        assert torch.equal(routing.logits, logits)
        assert torch.equal(routing.experts.sort().values, logits.topk(CHOSEN).indices.sort().values)
    model(input_ids=ids)
    assert len(routings) == layers  # nothing is recorded any more


@OVER
def test_gradient_checkpointing_changes_nothing(over: str) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        objective, module, rows, model = routed("sft", over, tokens=12)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        global_means(objective, module, rows, train=True)
        return [weight.grad for weight in model.parameters()]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_model_without_a_router_is_refused() -> None:
    with pytest.raises(StageError, match=r"^params.yaml: train_sft.sft.router_loss: LlamaForCausalLM has no router"):
        with_router_loss(SftObjective(batching(8)), settings("batch"), tiny_llama(), 1, "train_sft.sft")
    plain = SftObjective(batching(8))
    assert with_router_loss(plain, None, tiny_llama(), 1, "train_sft.sft") is plain
