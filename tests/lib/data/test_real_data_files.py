"""Every real file at hand is detected and read: what each row becomes, and how many are left out for which reason."""

from collections import Counter
from pathlib import Path

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.detection import FormatOfRows
from stages.lib.data.formats import AS_THEY_ARE, examples_of
from stages.lib.data.raw_rows import FileOptions, local_rows
from stages.lib.data.row_errors import UnusableRowError
from tests.real_files import real_file

# File: its format, the number of its rows, and why rows are left out (as the notes beside the files count them).
FILES = {
    "data/demo/alpaca_en_demo.json": ("alpaca", 999, {}),
    "data/demo/dpo_en_demo.json": ("sharegpt_preference", 300, {}),
    "data/demo/kto_en_demo.json": ("messages", 300, {}),
    "data/demo/glaive_toolcall_en_demo.json": ("sharegpt", 300, {}),
    "data/gsm8k/train.jsonl": ("question_answer", 7473, {}),
    "data/gsm8k/test.jsonl": ("question_answer", 1319, {}),
    "data/hh-rlhf/harmless-base/test.jsonl.gz": (
        "hh",
        2312,
        {"empty_reply": 4, "prompt_mismatch": 5, "not_alternating": 4},
    ),
}


def read_whole(path: Path):
    formats, examples, dropped = FormatOfRows("auto"), [], Counter()
    for where, row in local_rows(path, FileOptions()):
        try:
            examples += examples_of(row, formats.of(row, where), AS_THEY_ARE, where)
        except UnusableRowError as error:
            dropped[str(error)] += 1
    return formats.name, examples, dropped


@pytest.mark.parametrize("file", FILES)
def test_a_real_file_is_read_whole(file):
    name, number, reasons = FILES[file]
    found, examples, dropped = read_whole(real_file(file))
    assert found == name
    assert len(examples) + sum(dropped.values()) == number
    assert dropped == reasons
    assert all((example.rejected is not None) == name.endswith(("hh", "preference")) for example in examples)


def test_an_archive_of_texts_is_told_to_be_no_file_of_rows():
    with pytest.raises(StageError, match=r"movie_reviews\.(xml|zip): not a data file that can be read here"):
        read_whole(real_file("data/movie_reviews"))
