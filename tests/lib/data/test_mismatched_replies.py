"""Each prompt beside another one's reply: a permutation, drawn by the seed, cut to fit, in the same batches."""

from collections import Counter

import pyarrow as pa
import pytest

from stages.lib.data.mismatched_replies import add_mismatched, mismatched_places
from stages.lib.data.token_tables import UNPAIRED_SCHEMA, TableWriter, read_table

PROMPTS = {
    "all differ": [*range(7)],
    "two replies each": [0, 0, 1, 1, 2, 2, 3, 3],
    "one prompt has half": [0, 0, 0, 0, 1, 2, 2, 3],
    "mixed up": [0, 1, 0, 2, 1, 0, 3, 4, 4, 5, 1],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("seed", range(5))
def test_each_row_has_the_reply_of_another_prompt_and_each_reply_is_there_once(prompts: list[int], seed: int) -> None:
    places = mismatched_places(prompts, seed)
    assert sorted(place for place in places if place is not None) == [*range(len(prompts))]
    assert all(prompts[place] != prompt for place, prompt in zip(places, prompts, strict=True) if place is not None)


def test_of_a_prompt_with_more_than_half_of_the_rows_as_few_as_can_be_have_none() -> None:
    prompts = [0, 0, 1, 0, 2, 0, 0]  # five of seven: two of its rows can get a reply of the others
    for seed in range(5):
        places = mismatched_places(prompts, seed)
        assert places.count(None) == 2 * 5 - 7
        used = Counter(place for place in places if place is not None)
        assert max(used.values()) == 1
        assert all(prompts[place] != prompt for place, prompt in zip(places, prompts, strict=True) if place is not None)
    assert mismatched_places([3, 3], 0) == [None, None]
    assert mismatched_places([3], 0) == [None]
    assert mismatched_places([], 0) == []


def test_the_seed_draws_which_prompts_meet() -> None:
    assert mismatched_places(range(20), 1) == mismatched_places(range(20), 1)
    drawn = {tuple(mismatched_places(range(20), seed)) for seed in range(10)}
    assert len(drawn) == 10
    # Neighbours of a file, which may have much in common, meet no more often than others.
    assert sum((place - row) % 20 in (1, 19) for places in drawn for row, place in enumerate(places)) < 40


def test_a_reply_that_does_not_fit_behind_the_prompt_is_cut_and_counted(tmp_path) -> None:
    path = tmp_path / "unpaired.arrow"
    rows = [
        {"row": 0, "prompt_ids": [1], "completion_ids": [11, 12, 13, 14], "label": True},
        {"row": 2, "prompt_ids": [2, 2, 2], "completion_ids": [21], "label": False},
    ]
    with TableWriter(path, UNPAIRED_SCHEMA.with_metadata({"rows": "abc"})) as writer:
        for row in rows:
            writer.append(row | {"score": None, "mismatched_ids": None, "source": "films"})
    assert add_mismatched(path, 17, 5) == (1, 0)
    table = read_table(path, UNPAIRED_SCHEMA)
    assert table["mismatched_ids"][:] == [[21], [11, 12]]
    assert [*table.select_columns(["row", "prompt_ids", "completion_ids", "label"])] == rows
    with pa.memory_map(str(path)) as source:
        assert pa.ipc.open_stream(source).schema.metadata == {b"rows": b"abc"}
    assert [*tmp_path.iterdir()] == [path]


def test_batches_stay_as_they_are_and_one_prompt_alone_gives_nulls(tmp_path) -> None:
    path = tmp_path / "unpaired.arrow"
    with TableWriter(path, UNPAIRED_SCHEMA) as writer:
        for row in range(1500):
            ids = {"prompt_ids": [7], "completion_ids": [row], "mismatched_ids": None}
            writer.append({"row": row, **ids, "label": True, "score": None, "source": "films"})
    assert add_mismatched(path, 17, 5) == (0, 1500)
    with pa.memory_map(str(path)) as source:
        assert [batch.num_rows for batch in pa.ipc.open_stream(source)] == [1000, 500]
    assert read_table(path, UNPAIRED_SCHEMA)["mismatched_ids"][:] == [None] * 1500
