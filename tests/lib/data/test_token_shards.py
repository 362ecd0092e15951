"""Shards of a prepared file: where they begin, and that processes, kills and what was kept change no byte."""

import json
import os
import signal

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data import token_shards
from stages.lib.data.token_shards import Shard, ShardEncoder, encoded_shards, read_shard, row_shards, workers_for
from stages.lib.models.model_facts import ModelFacts
from stages.lib.settings.declaration import block
from stages.lib.settings.tokenize_data import Tokenize
from tests.lib.data.test_chat import TINY_VOCABULARY, tiny

MODEL = ModelFacts("llama", len(TINY_VOCABULARY), positions=40, has_classifier=True, attention_kernels=frozenset())


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(token_shards, "SHARD_ROWS", 4)
    monkeypatch.setattr(token_shards, "ROWS_WORTH_A_WORKER", 4)
    monkeypatch.setattr(token_shards, "ROWS_AT_ONCE", 3)


def write(path, count, changed=None):
    """Rows of growing length, some of which hold a special token; `changed` gives other text for some numbers."""
    lines = []
    for number in range(count):
        content = "<u>" if number % 5 == 3 else "hi" * (1 + number % 3)
        row = {"prompt": [{"role": "user", "content": content}], "source": "é" * (number % 4)}
        lines.append(json.dumps(row, ensure_ascii=False))
    for number, line in (changed or {}).items():
        lines[number] = line
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def encoder(**changes):
    settings = Tokenize(**(block(Tokenize) | {"max_length": 40, "max_prompt_length": 20} | changes))
    return ShardEncoder(tiny(), "hash", "prompts", settings, 17, MODEL)


def made_by(workers, shards, encode=None, kept=None):
    """All shards by number of processes; what was kept grows."""
    kept = {} if kept is None else kept
    return list(encoded_shards(encode or encoder(), shards, workers, kept.get, kept.__setitem__))


def test_shards_begin_where_their_lines_do(tmp_path):
    for count, sizes in ((1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (9, [4, 4, 1])):
        path = write(tmp_path / "rows.jsonl", count)
        shards = row_shards(path)
        assert [shard.rows for shard in shards] == sizes
        content = path.read_bytes().splitlines(keepends=True)
        for shard in shards:
            assert shard.offset == len(b"".join(content[: shard.first_row]))
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(StageError, match=r"rows\.jsonl is empty: expected one JSON object a line"):
        row_shards(tmp_path / "rows.jsonl")
    with pytest.raises(StageError, match=r"nothing\.jsonl does not exist"):
        row_shards(tmp_path / "nothing.jsonl")


def test_few_rows_are_not_worth_a_process():
    shards = [Shard("rows.jsonl", 0, 0, 4)] * 3
    assert [workers_for(shards, most) for most in (1, 2, 3, 9)] == [1, 2, 3, 3]
    assert workers_for([], 9) == 1


def test_a_shard_tells_its_rows_and_what_it_dropped(tmp_path):
    shards = row_shards(write(tmp_path / "rows.jsonl", 9))
    counts, batches = read_shard(encoder()(shards[1]))
    assert [row for batch in batches for row in batch["row"].to_pylist()] == [4, 5, 6, 7]
    counts, batches = read_shard(encoder()(shards[0]))
    assert [row for batch in batches for row in batch["row"].to_pylist()] == [0, 1, 2]
    assert (counts.rows, counts.prompt_tokens, dict(counts.dropped)) == (3, 4 + 6 + 8, {"special_token_in_text": 1})


def test_order_and_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    shards = row_shards(write(tmp_path / "rows.jsonl", 50))
    assert made_by(1, shards) == made_by(2, shards) == made_by(5, shards) == [encoder()(shard) for shard in shards]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_kept_is_not_made_again(tmp_path, workers):
    shards = row_shards(write(tmp_path / "rows.jsonl", 23))
    whole = made_by(1, shards)
    kept = dict(zip(shards[::2], whole[::2], strict=True))
    kept[shards[0]] = b"of an earlier start"
    assert made_by(workers, shards, kept=kept) == [b"of an earlier start", *whole[1:]]
    assert list(kept) == [*shards[::2], *shards[1::2]]  # the others, in order


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_faulty_row_is_named_and_what_came_before_is_kept(tmp_path, workers):
    path = write(tmp_path / "rows.jsonl", 40, {13: "{}", 14: "[1]", 30: "{"})
    kept = {}
    with pytest.raises(StageError, match=r"rows\.jsonl, line 14: 'source'.* is missing"):
        made_by(workers, row_shards(path), kept=kept)
    assert list(kept) == row_shards(path)[:3]
    too_long = json.dumps({"prompt": [{"role": "user", "content": "h" * 30}], "source": ""})
    path = write(tmp_path / "rows.jsonl", 40, {12: too_long, 13: "{}"})
    with pytest.raises(StageError, match=r"rows\.jsonl, line 13: prompt has 32 tokens, budget is 20"):
        made_by(workers, row_shards(path))


def test_a_line_that_is_no_text_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", 6)
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff"))
    with pytest.raises(StageError, match=r"rows\.jsonl, line 2: not UTF-8 text"):
        made_by(1, row_shards(path))


def test_a_process_that_is_killed_is_one_message(tmp_path):
    shards = row_shards(write(tmp_path / "rows.jsonl", 20))
    parent = os.getpid()

    def encode(shard):
        if shard == shards[2]:
            assert os.getpid() != parent
            os.kill(os.getpid(), signal.SIGKILL)
        return b"made"

    with pytest.raises(StageError, match=r"was ended from outside.*runtime\.yaml: tokenize_data\.workers"):
        made_by(2, shards, encode)
