"""Several replies behind one prompt: log-probs, scores and gradients are those of each sequence alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.compute.sequence_logprobs import all_pair_logps, pair_logps
from stages.lib.compute.sequence_scores import all_pair_scores, all_scores
from stages.lib.models.model_traits import NO_LIMIT, longest_shared
from stages.lib.models.scalar_scores import SequenceScores, TokenScores
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.rollouts import values_before
from stages.lib.settings.runtime import PassCost
from tests.tiny_models import CPU, EOS, PAD, batching, tiny_classifier, tiny_llama

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
SIZES |= {"vocab_size": 23, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "initializer_range": 0.4}
LLAMA_LIKE = SIZES | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
MOE = LLAMA_LIKE | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FULL = {"layer_types": ["full_attention"] * 2}
# Architecture → its configuration, and up to how many tokens its pairs may share.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "llama": (LLAMA_LIKE, NO_LIMIT),
    "qwen2": (LLAMA_LIKE, NO_LIMIT),
    "qwen3": (LLAMA_LIKE, NO_LIMIT),
    "gpt2": (SIZES | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, NO_LIMIT),
    "opt": (SIZES | {"ffn_dim": 24, "dropout": 0.0, "word_embed_proj_dim": 16}, NO_LIMIT),
    "gemma2": (LLAMA_LIKE | FULL | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, NO_LIMIT),
    "mistral": (LLAMA_LIKE | {"sliding_window": 9}, 9),
    "mixtral": (MOE | {"sliding_window": None}, NO_LIMIT),
    "qwen3_moe": (MOE, NO_LIMIT),
    "falcon": (SIZES | {"alibi": True}, 0),
    "bloom": (SIZES | {"n_layer": 2, "n_head": 2}, 0),
    "mpt": (SIZES | {"d_model": 16, "n_layers": 2, "n_heads": 2}, 0),
    "mamba": (SIZES | {"state_size": 4}, 0),
    "bert": (SIZES | {"intermediate_size": 24, "is_decoder": False}, 0),
}
SHARING = [name for name, (_, longest) in MODELS.items() if longest]
PAIRS = {
    "prompt_ids": [[3, 4, 5, 6, 7], [5], [6, 7, 8, 9, 10, 11], [8, 9, 3, 3]],
    "chosen_ids": [[9, EOS], [10, 11, 12, EOS], [13, EOS], [EOS]],
    "rejected_ids": [[14, 15, EOS], [EOS], [16, 17, EOS], [10, 11, EOS]],
}
CHEAP = PassCost(overhead=3, attention=10**9)


def model_of(name: str, attention: str = "sdpa") -> Any:
    options, _ = MODELS[name]
    attention = "eager" if name in ("gemma2", "bloom", "mpt", "mamba") else attention  # transformers has no other
    config = transformers.AutoConfig.for_model(name, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.train()


def sharing(model: Any, budget: int = 1000, *, packing: bool = False) -> MicroBatching:
    return replace(batching(budget, packing), cost=CHEAP, longest_shared=longest_shared(model))


def kinds(plan: MicroBatching) -> list[bool]:
    """Of each pass over the pairs, whether they share prompts."""
    return [batch.reading_order is not None for batch in plan.pairs(*PAIRS.values())]


def gradient(module: Any, plan: MicroBatching) -> tuple[torch.Tensor, list[float]]:
    """Of a sum in which each sequence has a weight of its own, and the log-probs."""
    module.zero_grad()
    weights = torch.linspace(-1, 2, 2 * len(PAIRS["prompt_ids"])).tensor_split(2)
    found = [0.0] * 2 * len(PAIRS["prompt_ids"])
    for batch in plan.pairs(*PAIRS.values()):
        for side, (logps, weight) in enumerate(zip(pair_logps(module, batch), weights, strict=True)):
            (logps * weight[batch.rows]).sum().backward(retain_graph=True)
            for row, value in zip(batch.rows, logps.tolist(), strict=True):
                found[side * len(PAIRS["prompt_ids"]) + row] = value
    gradients = [p.grad.flatten() if p.grad is not None else p.detach().flatten() * 0 for p in module.parameters()]
    return torch.cat(gradients), found


@pytest.mark.parametrize("name", MODELS)
def test_how_long_pairs_may_be_by_architecture(name: str) -> None:
    assert longest_shared(model_of(name)) == MODELS[name][1]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", SHARING)
def test_log_probs_and_gradients_are_those_of_pairs_apart(name: str, packing: bool) -> None:
    if packing and name == "opt":
        pytest.skip("OPT cannot be packed")
    model = model_of(name)
    module, plan = TokenLogProbs(model), sharing(model, packing=packing)
    assert any(kinds(plan))
    expected, logps = gradient(module, replace(plan, longest_shared=0))
    found, shared_logps = gradient(module, plan)
    assert shared_logps == pytest.approx(logps, rel=1e-5, abs=1e-5)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [1, 20, 1000])
@pytest.mark.parametrize("packing", [False, True])
def test_scores_are_those_of_pairs_apart(packing: bool, budget: int, attention: str) -> None:
    model = tiny_classifier().eval()
    model.set_attn_implementation(attention)
    scorer, plan = SequenceScores(model), sharing(model, budget, packing=packing)
    found, expected = (all_pair_scores(scorer, PAIRS, one) for one in (plan, replace(plan, longest_shared=0)))
    assert any(kinds(plan))
    for side, other in zip(found, expected, strict=True):
        assert side == pytest.approx(other, abs=1e-5)


def test_layout_by_hand() -> None:
    plan = sharing(tiny_llama())
    (batch,) = plan.pairs([[3, 4, 5]], [[6, 7]], [[8]])
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7, 5, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 2, 2, 2, 3, 3]]
    assert batch.completion_mask.int().tolist() == [[0, 0, 0, 1, 1, 0, 1]]
    assert batch.end_mask.tolist() == [[0, 0, 0, 0, 1, 0, 2]]
    assert batch.on_completions(batch.input_ids).tolist() == [[6, 7], [8, 0]]


def test_the_chosen_come_first_whatever_the_order_of_the_rows() -> None:
    plan = sharing(tiny_llama())
    (batch,) = plan.pairs([[3, 4, 5], [4, 5, 6, 7]], [[6, 7], [9]], [[8], [10, 11, 12]])
    assert batch.rows == [1, 0]
    assert batch.on_completions(batch.input_ids).tolist() == [[9, 0, 0], [6, 7, 0], [10, 11, 12], [8, 0, 0]]
    assert batch.end_mask[batch.end_mask > 0].tolist() == [1, 3, 2, 4]


def test_pairs_share_where_it_costs_less() -> None:
    plan = replace(sharing(tiny_llama()), cost=PassCost(overhead=1, attention=20))
    # Behind one prompt 4 + 1 + 2 tokens, apart 2 · 5; then 1 + 1 + 40 tokens that all see each other, and 2 · 21.
    prompts, chosen, rejected = [[3, 4, 5, 6], [7]], [[8], [9] * 20], [[10], [11] * 20]
    found = {batch.rows[0]: batch.reading_order is not None for batch in plan.pairs(prompts, chosen, rejected)}
    assert found == {0: True, 1: False}
    dear = replace(plan, cost=PassCost(overhead=100, attention=20))  # a pass more costs more than sharing saves
    assert [batch.reading_order for batch in dear.pairs(prompts, chosen, rejected)] == [None]


def test_pairs_beyond_the_window_stay_apart() -> None:
    plan = sharing(model_of("mistral"))  # sees 9 tokens
    long = [[3] * 7], [[4, 5, EOS]], [[6, EOS]]
    assert [batch.reading_order for batch in plan.pairs(*long)] == [None]
    assert [batch.reading_order for batch in plan.pairs([[3] * 6], *long[1:])] == [[0, 1]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_process_makes_as_many_passes(world_size: int) -> None:
    plan = replace(sharing(tiny_llama(), 30), cost=PassCost(overhead=1, attention=12))
    plans = [replace(plan, processes=Processes(rank, world_size, CPU)) for rank in range(world_size)]
    parts = [list(one.pairs(*PAIRS.values())) for one in plans]
    assert len({len(part) for part in parts}) == 1
    assert sorted(row for part in parts for batch in part for row in batch.rows) == [0, 1, 2, 3]
    module = TokenLogProbs(tiny_llama())
    expected = all_pair_logps(module, PAIRS, replace(plan, longest_shared=0)).chosen
    for batch in (batch for part in parts for batch in part):
        assert pair_logps(module, batch).chosen.tolist() == pytest.approx(expected[batch.rows].tolist(), abs=1e-5)


# Four responses to one prompt and two to another one, among those of others, and one that is longer than it may be.
GROUPS = ([[3, 4, 5, 6, 7], [5, 6], [3, 4, 5, 6, 7], [8], [5, 6], *[[3, 4, 5, 6, 7]] * 3], [[9, EOS], [10] * 3, [11]])
GROUPS[1].extend([[12, 13, EOS], [14, EOS], [15] * 12, [EOS], [16, 9]])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("budget", [16, 1000])
def test_responses_to_one_prompt_read_it_once(budget: int, packing: bool) -> None:
    module, critic = TokenLogProbs(tiny_llama(), with_entropies=True), TokenScores(tiny_classifier())
    plan = replace(batching(budget, packing), cost=CHEAP, longest_shared=12)
    apart = batching(budget, packing)

    def read(how: MicroBatching) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        module.zero_grad()
        logps, values, tokens = torch.zeros(8, 12), torch.zeros(8, 12), 0
        for batch in how.sequences(*GROUPS):
            found = batch.on_completions(module(*batch.inputs, batch.completion_mask).logps, 12)
            (found * torch.linspace(-1, 2, 8)[batch.rows, None]).sum().backward()
            logps[batch.rows] = found.detach()
            values[batch.rows] = batch.on_completions(values_before(critic, batch), 12).detach()
            tokens += batch.input_ids.numel()
        gradient = torch.cat([weight.grad.flatten() for weight in module.parameters()])
        return logps, values, gradient, tokens

    (*ours, fewer), (*theirs, more) = read(plan), read(apart)
    for own, other in zip(ours, theirs, strict=True):
        assert (own - other).norm() < 1e-5 * other.norm()
    assert fewer < 0.85 * more
    scorer = SequenceScores(tiny_classifier())
    assert all_scores(scorer, *GROUPS, plan) == pytest.approx(all_scores(scorer, *GROUPS, apart), abs=1e-5)


def test_a_prompt_is_shared_where_that_is_cheaper() -> None:
    plan = replace(batching(1000), cost=CHEAP, longest_shared=NO_LIMIT)

    def rows(how: MicroBatching, prompt: int, replies: list[int]) -> list[int]:
        """How many tokens each row of the passes has."""
        ids = [[3] * prompt] * len(replies)
        return [
            shape for batch in how.sequences(ids, [[4] * reply for reply in replies]) for shape in batch.input_ids.shape
        ]

    assert rows(plan, 10, [3, 3, 3]) == [1, 9 + 3 * 4]
    assert rows(plan, 1, [3, 3, 3]) == [3, 4]  # nothing to share
    assert rows(replace(plan, longest_shared=12), 10, [3, 3, 3]) == [3, 13]
    assert rows(replace(plan, cost=PassCost(overhead=3, attention=5)), 10, [9, 9]) == [2, 19]  # attention costs more
    assert rows(replace(plan, budget=MemoryBudget("micro_batch_tokens", 17)), 10, [3, 3, 3]) == [1, 17, 1, 13]
