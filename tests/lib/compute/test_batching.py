"""Which rows a step sees, and how they are cut into forward passes."""

from collections import Counter
from dataclasses import replace

import pytest

from stages.lib.compute.batching import (
    MicroBatching,
    balanced_shares,
    epoch_order,
    is_due,
    pad_left,
    rows_of_step,
    steps_in,
)
from stages.lib.compute.processes import Processes
from stages.lib.compute.sequence_logprobs import all_response_logps
from stages.lib.models.token_logprobs import TokenLogProbs
from tests import tiny_models
from tests.tiny_models import CPU


def batching(budget: int = 100, *, packing: bool = False, rank: int = 0, world_size: int = 1) -> MicroBatching:
    return tiny_models.batching(budget, packing, 0, Processes(rank, world_size, CPU))


def test_an_epoch_is_a_permutation_that_changes_with_seed_and_epoch() -> None:
    order = epoch_order(50, seed=3, epoch=0).tolist()
    assert sorted(order) == list(range(50))
    assert order == epoch_order(50, seed=3, epoch=0).tolist()
    assert order != epoch_order(50, seed=3, epoch=1).tolist()
    assert order != epoch_order(50, seed=4, epoch=0).tolist()


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"),
    [(10, 4, 1.0, 3), (10, 4, 2.0, 5), (10, 5, 0.5, 1), (10, 4, 0.01, 1), (8, 4, 1.0, 2)],
)
def test_steps_cover_the_epochs(rows: int, batch: int, epochs: float, steps: int) -> None:
    assert steps_in(rows, batch, epochs) == steps


def test_every_row_is_seen_once_an_epoch_though_a_batch_spans_two() -> None:
    seen = [row for step in range(steps_in(10, 4, 2.0)) for row in rows_of_step(step, 10, 4, 2.0, seed=1)]
    assert len(seen) == 20
    assert set(Counter(seen).values()) == {2}
    assert sorted(seen[:10]) == list(range(10))


def test_a_fraction_of_an_epoch_ends_in_a_smaller_batch() -> None:
    assert [len(rows_of_step(step, 10, 4, 0.7, seed=1)) for step in range(steps_in(10, 4, 0.7))] == [4, 3]


def test_padding_on_the_left_comes_from_lengths() -> None:
    ids, mask = pad_left([[5, 0], [6]], 0, CPU)  # 0 is a real token here, and the pad id
    assert ids.tolist() == [[5, 0], [0, 6]]
    assert mask.tolist() == [[True, True], [False, True]]


def test_sequences_are_prompt_and_completion_and_masks_come_from_lengths() -> None:
    (batch,) = batching().sequences([[1, 0], [3]], [[4], [5, 6, 0]])
    assert batch.rows == [1, 0]
    assert batch.input_ids.tolist() == [[3, 5, 6, 0], [1, 0, 4, 0]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 2]]
    assert batch.completion_mask.tolist() == [[False, True, True, True], [False, False, True, False]]
    assert batch.end_mask.tolist() == [[False, False, False, True], [False, False, True, False]]
    assert batch.completion_lengths == [3, 1]


def test_packed_sequences_lie_end_to_end() -> None:
    (batch,) = batching(packing=True).sequences([[1, 0], [3]], [[4], [5, 6, 0]])
    assert batch.input_ids.tolist() == [[3, 5, 6, 0, 1, 0, 4]]
    assert batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.completion_mask.int().tolist() == [[0, 1, 1, 1, 0, 0, 1]]
    assert batch.end_mask.int().tolist() == [[0, 0, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize("packing", [False, True])
def test_values_of_completion_tokens_are_a_row_for_each_sequence(packing: bool) -> None:
    (batch,) = batching(packing=packing).sequences([[1, 0], [3]], [[4], [5, 6, 0]])
    assert batch.on_completions(batch.input_ids).tolist() == [[5, 6, 0], [4, 0, 0]]
    assert batch.on_completions(batch.input_ids, width=4).tolist() == [[5, 6, 0, 0], [4, 0, 0, 0]]


def test_a_row_without_padding_needs_no_mask() -> None:
    (batch,) = batching().sequences([[1, 2], [3]], [[4], [5, 6]])
    assert batch.attention_mask is None


def test_rows_are_as_long_as_a_multiple_and_compute_the_same() -> None:
    prompts, completions = [[3, 4], [5], [6, 7]], [[8, 9, 10], [11, 1], [12, 13, 14, 1]]
    own, wider = batching(18), replace(batching(18), multiple=4)
    widths = [[batch.input_ids.shape[1] for batch in plan.sequences(prompts, completions)] for plan in (own, wider)]
    assert widths == [[6], [8, 4]]  # of 18 tokens two rows of 8 are left
    (batch,) = wider.sequences(prompts[:1], completions[:1])
    assert batch.input_ids.tolist() == [[3, 4, 8, 9, 10, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 5 + [False] * 3]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 4, 4]]
    module = TokenLogProbs(tiny_models.tiny_llama())
    logps = [all_response_logps(module, prompts, completions, plan).tolist() for plan in (own, wider)]
    assert logps[0] == pytest.approx(logps[1], abs=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_pairs_put_the_chosen_before_the_rejected(packing: bool) -> None:
    (batch,) = batching(packing=packing).pairs([[1, 2], [3]], [[4], [5]], [[6], [7, 8]])
    expected = {(3, 5), (1, 2, 4), (3, 7, 8), (1, 2, 6)}
    ends = batch.end_mask.flatten().nonzero().flatten().tolist()
    tokens = batch.input_ids.flatten().tolist()
    starts = [place - int(batch.position_ids.flatten()[place]) for place in ends]
    found = [tuple(tokens[start : end + 1]) for start, end in zip(starts, ends, strict=True)]
    assert set(found) == expected
    chosen, rejected = found[:2], found[2:]
    assert [pair[0] for pair in chosen] == [pair[0] for pair in rejected]
    assert {pair[-1] for pair in chosen} == {4, 5}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_every_process_makes_as_many_passes_and_every_row_is_in_one(world_size: int, packing: bool, rows: int) -> None:
    prompts = [[1] * (1 + row * 7 % 5) for row in range(rows)]
    completions = [[2] * (1 + row * 3 % 4) for row in range(rows)]
    parts = [
        list(batching(12, packing=packing, rank=rank, world_size=world_size).sequences(prompts, completions))
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    assert sorted(row for part in parts for batch in part for row in batch.rows) == list(range(rows))
    for batch in (batch for part in parts for batch in part if not batch.rows):
        assert not batch.completion_mask.any()
        assert not batch.end_mask.any()
        assert batch.on_completions(batch.input_ids).shape[0] == 0


def test_shares_hold_about_as_many_tokens() -> None:
    lengths = [100, 10, 10, 60, 50, 90, 40, 40]
    shares = balanced_shares([[place] for place in range(8)], lengths, 2)
    loads = [sum(lengths[row] for group in share for row in group) for share in shares]
    assert loads == [200, 200]
    assert [len(share) for share in shares] == [4, 4]


def test_evaluation_is_due_every_so_often_and_at_the_end() -> None:
    assert [step for step in range(1, 8) if is_due(step, 3, 7)] == [3, 6, 7]
