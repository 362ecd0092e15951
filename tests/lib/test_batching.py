"""Which rows a step sees, and how they are cut into forward passes."""

from collections import Counter

import pytest

from stages.lib.batching import (
    completion_mask,
    epoch_order,
    is_due,
    micro_batches,
    pad_left,
    pad_right,
    pair_batches,
    rows_of_step,
    sequence_batches,
    steps_in,
)
from tests.tiny_models import CPU


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


def test_micro_batches_hold_every_item_once_within_the_budget() -> None:
    lengths = [5, 1, 9, 3, 3, 12, 2]
    groups = micro_batches(lengths, 10)
    assert sorted(index for group in groups for index in group) == list(range(7))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= 10
    assert groups == [[5], [2], [0, 3], [4, 6, 1]]


def test_padding_stands_where_it_should_and_masks_come_from_lengths() -> None:
    ids, mask = pad_right([[5, 0], [6]], 0, CPU)  # 0 is a real token here, and the pad id
    assert ids.tolist() == [[5, 0], [6, 0]]
    assert mask.tolist() == [[True, True], [True, False]]
    ids, mask = pad_left([[5, 0], [6]], 0, CPU)
    assert ids.tolist() == [[5, 0], [0, 6]]
    assert mask.tolist() == [[True, True], [False, True]]


def test_a_completion_is_what_follows_the_prompt() -> None:
    assert completion_mask([1, 2], [3, 2], 4, CPU).tolist() == [[False, True, True, False], [False] * 4]


def test_sequences_are_prompt_and_completion() -> None:
    (batch,) = sequence_batches([[1, 2], [3]], [[4], [5, 6, 7]], 100, 0, CPU)
    assert batch.rows == [1, 0]
    assert batch.input_ids.tolist() == [[3, 5, 6, 7], [1, 2, 4, 0]]
    assert batch.completion_mask.tolist() == [[False, True, True, True], [False, False, True, False]]


def test_pairs_put_the_chosen_before_the_rejected() -> None:
    batches = list(pair_batches([[1, 2], [3]], [[4], [5]], [[6], [7, 8]], 100, 0, CPU))
    assert [batch.rows for batch in batches] == [[0, 1]]
    assert batches[0].input_ids.tolist() == [[1, 2, 4], [3, 5, 0], [1, 2, 6], [3, 7, 8]]


def test_evaluation_is_due_every_so_often_and_at_the_end() -> None:
    assert [step for step in range(1, 8) if is_due(step, 3, 7)] == [3, 6, 7]
