"""Token tables and tokenizer files: what is written is what is read, byte for byte."""

import json

import pyarrow as pa
import pytest

from stages.lib.errors import StageError
from stages.lib.hashing import file_hash
from stages.lib.token_tables import (
    PREFERENCE_SCHEMA,
    PROMPT_SCHEMA,
    REFERENCE_SCHEMA,
    SFT_SCHEMA,
    TableWriter,
    check_table_ids,
    read_table,
    write_table,
)
from stages.lib.tokenizer_files import TOKENIZER_FILES, copy_tokenizer, read_model_limits, require_same_tokenizer


def prompts(count):
    """Rows whose ids tell their number; every third row of the prepared file was dropped."""
    rows = [number for number in range(2 * count) if number % 3 != 2][:count]
    return {"row": rows, "prompt_ids": [[row % 7] * (row % 5) + [row] for row in rows]}


def test_a_table_comes_back(tmp_path):
    columns = {
        "row": [0, 2],
        "prompt_ids": [[1, 2], [3]],
        "chosen_ids": [[4, 0], [5, 6, 0]],
        "rejected_ids": [[0], [7, 0]],
        "margin": [0.0, 0.5],
    }
    write_table(tmp_path / "t.arrow", columns, PREFERENCE_SCHEMA)
    table = read_table(tmp_path / "t.arrow", PREFERENCE_SCHEMA)
    assert len(table) == 2
    assert table[1] == {"row": 2, "prompt_ids": [3], "chosen_ids": [5, 6, 0], "rejected_ids": [7, 0], "margin": 0.5}
    assert table["chosen_ids"][0] == [4, 0]
    assert table[[1, 0]]["row"] == [2, 0]


def test_masks_and_log_probs_come_back(tmp_path):
    write_table(tmp_path / "s.arrow", {"row": [5], "input_ids": [[1, 2]], "loss_mask": [[False, True]]}, SFT_SCHEMA)
    assert read_table(tmp_path / "s.arrow", SFT_SCHEMA)[0]["loss_mask"] == [False, True]
    logps = {"row": [5], "reference_chosen_logps": [-1.5], "reference_rejected_logps": [-2.25]}
    write_table(tmp_path / "r.arrow", logps, REFERENCE_SCHEMA)
    assert read_table(tmp_path / "r.arrow", REFERENCE_SCHEMA)[0] == {key: value[0] for key, value in logps.items()}


def test_batches_have_a_fixed_size_and_bytes_do_not_depend_on_how_rows_came(tmp_path):
    columns = prompts(2500)
    write_table(tmp_path / "whole.arrow", columns, PROMPT_SCHEMA)
    with TableWriter(tmp_path / "rows.arrow", PROMPT_SCHEMA) as writer:
        for row, ids in zip(*columns.values(), strict=True):
            writer.append({"row": row, "prompt_ids": ids})
    assert writer.rows == 2500
    assert file_hash(tmp_path / "whole.arrow") == file_hash(tmp_path / "rows.arrow")
    with pa.OSFile(str(tmp_path / "whole.arrow")) as file, pa.ipc.open_stream(file) as stream:
        assert [batch.num_rows for batch in stream] == [1000, 1000, 500]
    table = read_table(tmp_path / "whole.arrow", PROMPT_SCHEMA)
    assert {name: list(table[name]) for name in columns} == columns


def test_a_table_is_memory_mapped(tmp_path):
    write_table(tmp_path / "t.arrow", prompts(5), PROMPT_SCHEMA)
    before = pa.total_allocated_bytes()
    table = read_table(tmp_path / "t.arrow", PROMPT_SCHEMA)
    assert table.cache_files == [{"filename": str(tmp_path / "t.arrow")}]
    assert pa.total_allocated_bytes() == before


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "t.arrow"
    with pytest.raises(StageError, match=r"t\.arrow does not exist"):
        read_table(path, PROMPT_SCHEMA)
    write_table(path, {"row": [], "prompt_ids": []}, PROMPT_SCHEMA)
    with pytest.raises(StageError, match=r"t\.arrow holds no rows"):
        read_table(path, PROMPT_SCHEMA)
    write_table(path, prompts(5), PROMPT_SCHEMA)
    with pytest.raises(StageError, match=r"t\.arrow: expected columns .*chosen_ids.*, found row \(int32\), prompt_ids"):
        read_table(path, PREFERENCE_SCHEMA)
    write_table(path, prompts(2500), PROMPT_SCHEMA)
    whole = path.read_bytes()
    for content in (b"", b"no stream at all", whole[: len(whole) // 2]):
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(StageError, match=r"t\.arrow is no Arrow stream, or is cut short"):
            read_table(path, PROMPT_SCHEMA)


def test_columns_must_be_those_of_the_schema_and_of_one_length(tmp_path):
    with pytest.raises(ValueError, match="are not those of the schema"):
        write_table(tmp_path / "t.arrow", {"row": [1]}, PROMPT_SCHEMA)
    with pytest.raises(ValueError, match="shorter"):
        write_table(tmp_path / "t.arrow", {"row": [1, 2], "prompt_ids": [[1]]}, PROMPT_SCHEMA)


@pytest.mark.parametrize("foreign", [12, -1])
def test_an_id_outside_the_vocabulary_is_named_with_its_row(tmp_path, foreign):
    ids = [[0, 11]] * 1500
    write_table(tmp_path / "t.arrow", {"row": range(10, 1510), "prompt_ids": ids}, PROMPT_SCHEMA)
    check_table_ids(read_table(tmp_path / "t.arrow", PROMPT_SCHEMA), ["prompt_ids"], 12, tmp_path / "t.arrow")
    ids[1200] = [3, foreign, 4]
    write_table(tmp_path / "u.arrow", {"row": range(10, 1510), "prompt_ids": ids}, PROMPT_SCHEMA)
    message = rf"u\.arrow, row 1210, prompt_ids: token id {foreign} is outside the vocabulary of 12"
    with pytest.raises(StageError, match=message):
        check_table_ids(read_table(tmp_path / "u.arrow", PROMPT_SCHEMA), ["prompt_ids"], 12, tmp_path / "u.arrow")


def write_tokenizer(folder):
    folder.mkdir()
    for number, name in enumerate(TOKENIZER_FILES):
        (folder / name).write_bytes(b"\r\n content %d \xff" % number)


def test_tokenizer_files_are_copied_byte_for_byte(tmp_path):
    write_tokenizer(tmp_path / "a")
    (tmp_path / "a/model.safetensors").write_bytes(b"weights")
    copy_tokenizer(tmp_path / "a", tmp_path / "b")
    copied = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert copied == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert (tmp_path / "b/tokenizer.json").read_bytes() == b"\r\n content 0 \xff"
    require_same_tokenizer(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_different_tokenizers_are_named(tmp_path, name):
    write_tokenizer(tmp_path / "a")
    write_tokenizer(tmp_path / "b")
    (tmp_path / "b" / name).write_bytes(b"other")
    with pytest.raises(StageError, match=rf"/a and .*/b have different tokenizers: their {name} differ"):
        require_same_tokenizer(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / name).unlink()
    with pytest.raises(StageError, match=rf"/b/{name} is missing"):
        require_same_tokenizer(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"vocab_size": 5, "max_position_embeddings": 7}, (5, 7)),
        ({"vocab_size": 5, "n_positions": 8}, (5, 8)),
        ({"vocab_size": 5}, (5, None)),
        (  # LongRoPE: beyond these, all sequences of a batch get other angles
            {
                "vocab_size": 5,
                "max_position_embeddings": 700,
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 70},
            },
            (5, 70),
        ),
        (
            {
                "vocab_size": 5,
                "max_position_embeddings": 700,
                "original_max_position_embeddings": 60,
                "rope_scaling": {"type": "longrope"},
            },
            (5, 60),
        ),
        ({"vocab_size": 5, "max_position_embeddings": 700, "rope_parameters": {"rope_type": "llama3"}}, (5, 700)),
        ({"text_config": {"vocab_size": 6, "max_position_embeddings": 9}}, (6, 9)),
    ],
)
def test_limits_of_a_model(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_limits(tmp_path) == expected


def test_a_folder_without_limits_is_no_model(tmp_path):
    with pytest.raises(StageError, match=r"is no model directory: .*config\.json is missing"):
        read_model_limits(tmp_path)
    (tmp_path / "config.json").write_text("{\n x")
    with pytest.raises(StageError, match=r"config\.json, line 2: not valid JSON"):
        read_model_limits(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StageError, match="expected a whole number as 'vocab_size'"):
        read_model_limits(tmp_path)
