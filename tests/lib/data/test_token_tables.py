"""Token tables and tokenizer files: what is written is what is read, byte for byte."""

import pyarrow as pa
import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import file_hash
from stages.lib.data.token_tables import (
    PREFERENCE_SCHEMA,
    PROMPT_SCHEMA,
    REFERENCE_SCHEMA,
    SFT_SCHEMA,
    TOKEN_REFERENCE_SCHEMA,
    TOKENIZER_NOTE,
    UNPAIRED_SCHEMA,
    TableWriter,
    batch_of,
    check_table_fits,
    read_note,
    read_table,
    write_table,
)
from stages.lib.models.model_facts import ModelFacts
from stages.lib.models.tokenizer_files import (
    TOKENIZER_FILES,
    copy_tokenizer,
    require_same_tokenizer,
    require_tokens_of,
    tokenizer_hash,
)

MESSAGES = '[{"content": "?", "role": "user"}]'


def prompts(count):
    """Rows whose ids tell their number; every third row of the prepared file was dropped."""
    rows = [number for number in range(2 * count) if number % 3 != 2][:count]
    return with_texts({"row": rows, "prompt_ids": [[row % 7] * (row % 5) + [row] for row in rows]})


def with_texts(columns):
    """The same messages, facts and source in every row."""
    count = len(columns["row"])
    texts = {"messages": MESSAGES, "facts": '{"task": "sums"}', "context": '{"tools": []}', "source": "films"}
    return columns | {name: [text] * count for name, text in texts.items()}


@pytest.mark.parametrize("lists", [[[1, 2], [], [2**31 - 1]], [], [[]], [None, [3]], [[4, None]]])
def test_ids_become_what_pyarrow_makes_of_them(lists):
    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    made = batch_of([{"input_ids": ids} for ids in lists], schema)
    made.validate(full=True)
    assert made.equals(pa.record_batch([pa.array(lists, schema.field(0).type)], schema=schema))


@pytest.mark.parametrize("wrong", [2**31, "1"])
def test_what_is_no_id_is_not_made_one(wrong):
    with pytest.raises((OverflowError, pa.ArrowException)):
        batch_of([{"input_ids": [1, wrong]}], pa.schema([("input_ids", pa.list_(pa.int32()))]))


def test_a_table_comes_back(tmp_path):
    columns = {
        "row": [0, 2],
        "prompt_ids": [[1, 2], [3]],
        "chosen_ids": [[4, 0], [5, 6, 0]],
        "rejected_ids": [[0], [7, 0]],
        "margin": [0.0, 0.5],
        "source": ["films", "ratings"],
    }
    write_table(tmp_path / "t.arrow", columns, PREFERENCE_SCHEMA)
    table = read_table(tmp_path / "t.arrow", PREFERENCE_SCHEMA)
    assert len(table) == 2
    assert table[1] == {name: values[1] for name, values in columns.items()}
    assert table["chosen_ids"][0] == [4, 0]
    assert table[[1, 0]]["row"] == [2, 0]


def test_masks_and_log_probs_come_back(tmp_path):
    columns = {"row": [5], "input_ids": [[1, 2]], "loss_mask": [[False, True]], "source": ["films"]}
    columns |= {"messages": ["[]"], "context": ["{}"]}
    write_table(tmp_path / "s.arrow", columns, SFT_SCHEMA)
    assert read_table(tmp_path / "s.arrow", SFT_SCHEMA)[0]["loss_mask"] == [False, True]
    logps = {"row": [5], "reference_chosen_logps": [-1.5], "reference_rejected_logps": [-2.25]}
    write_table(tmp_path / "r.arrow", logps, REFERENCE_SCHEMA)
    assert read_table(tmp_path / "r.arrow", REFERENCE_SCHEMA)[0] == {key: value[0] for key, value in logps.items()}


def test_batches_have_a_fixed_size_and_bytes_do_not_depend_on_how_rows_came(tmp_path):
    columns = prompts(2500)
    write_table(tmp_path / "whole.arrow", columns, PROMPT_SCHEMA)
    with TableWriter(tmp_path / "rows.arrow", PROMPT_SCHEMA) as writer:
        for values in zip(*columns.values(), strict=True):
            writer.append(dict(zip(columns, values, strict=True)))
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
    assert len(table) == 5
    assert pa.total_allocated_bytes() == before


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "t.arrow"
    with pytest.raises(StageError, match=r"t\.arrow does not exist"):
        read_table(path, PROMPT_SCHEMA)
    write_table(path, prompts(0), PROMPT_SCHEMA)
    with pytest.raises(StageError, match=r"t\.arrow holds no rows"):
        read_table(path, PROMPT_SCHEMA)
    write_table(path, prompts(5), PROMPT_SCHEMA)
    with pytest.raises(
        StageError, match=r"t\.arrow: expected columns .*chosen_ids.*, found row \(int32\), prompt_ids.*; run the "
    ):
        read_table(path, PREFERENCE_SCHEMA)
    write_table(path, prompts(2500), PROMPT_SCHEMA)
    whole = path.read_bytes()
    for content in (b"", b"no stream at all", whole[: len(whole) // 2]):
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(StageError, match=r"t\.arrow is not an Arrow stream, or is cut short"):
            read_table(path, PROMPT_SCHEMA)


def test_columns_must_be_those_of_the_schema_and_of_one_length(tmp_path):
    with pytest.raises(ValueError, match="are not those of the schema"):
        write_table(tmp_path / "t.arrow", {"row": [1]}, PROMPT_SCHEMA)
    with pytest.raises(ValueError, match="shorter"):
        write_table(tmp_path / "t.arrow", with_texts({"row": [1, 2], "prompt_ids": [[1]]}), PROMPT_SCHEMA)


SMALL = ModelFacts("llama", vocab_size=12, positions=5, has_classifier=True, attention_kernels=frozenset({"sdpa"}))


def test_a_row_of_more_tokens_than_positions_is_named(tmp_path):
    path = tmp_path / "t.arrow"
    columns = {"row": [4, 7], "prompt_ids": [[1, 2], [1, 2, 3]], "chosen_ids": [[1, 2, 3], [1]], "margin": [None, None]}
    columns["source"] = ["films", "films"]
    write_table(path, columns | {"rejected_ids": [[1], [1, 2]]}, PREFERENCE_SCHEMA)
    check_table_fits(read_table(path, PREFERENCE_SCHEMA), SMALL, path)
    with pytest.raises(StageError, match=r"t\.arrow, row 4: 5 tokens"):
        check_table_fits(read_table(path, PREFERENCE_SCHEMA), SMALL._replace(positions=4), path)


@pytest.mark.parametrize("foreign", [12, -1])
def test_an_id_outside_the_vocabulary_is_named_with_its_row(tmp_path, foreign):
    ids = [[0, 11]] * 1500
    write_table(tmp_path / "t.arrow", with_texts({"row": range(10, 1510), "prompt_ids": ids}), PROMPT_SCHEMA)
    check_table_fits(read_table(tmp_path / "t.arrow", PROMPT_SCHEMA), SMALL, tmp_path / "t.arrow")
    ids[1200] = [3, foreign, 4]
    write_table(tmp_path / "u.arrow", with_texts({"row": range(10, 1510), "prompt_ids": ids}), PROMPT_SCHEMA)
    message = rf"u\.arrow, row 1210, prompt_ids: token id {foreign} is outside the vocabulary of 12"
    with pytest.raises(StageError, match=message):
        check_table_fits(read_table(tmp_path / "u.arrow", PROMPT_SCHEMA), SMALL, tmp_path / "u.arrow")


def write_tokenizer(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
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


def test_a_table_belongs_to_the_tokenizer_that_made_it(tmp_path):
    write_tokenizer(tmp_path / "a")
    write_tokenizer(tmp_path / "b")
    assert tokenizer_hash(tmp_path / "a") == tokenizer_hash(tmp_path / "b")
    schema = PROMPT_SCHEMA.with_metadata({TOKENIZER_NOTE: tokenizer_hash(tmp_path / "a")})
    for split in ("train", "eval"):
        write_table(tmp_path / f"tokens/{split}.arrow", prompts(5), schema)
    for tokens in (tmp_path / "tokens", tmp_path / "tokens/train.arrow"):
        require_tokens_of(tokens, tmp_path / "b")
    (tmp_path / "b/chat_template.jinja").write_bytes(b"other")
    message = r"tokens/eval\.arrow was made with another tokenizer than that of .*/b \(hash \w{12}, expected \w{12}\)"
    with pytest.raises(StageError, match=message):
        require_tokens_of(tmp_path / "tokens", tmp_path / "b")
    write_table(tmp_path / "tokens/eval.arrow", prompts(5), PROMPT_SCHEMA)
    with pytest.raises(StageError, match=r"eval\.arrow was made with another tokenizer .* \(hash None, expected"):
        require_tokens_of(tmp_path / "tokens", tmp_path / "a")
    with pytest.raises(StageError, match=r"none\.arrow does not exist"):
        require_tokens_of(tmp_path / "none.arrow", tmp_path / "a")


def test_notes_that_are_not_text(tmp_path):
    path = tmp_path / "t.arrow"
    write_table(path, prompts(5), PROMPT_SCHEMA.with_metadata({b"tokenizer": b"\xff", b"\xff": b"x"}))
    assert len(read_table(path, PROMPT_SCHEMA)) == 5
    with pytest.raises(StageError, match=r"t\.arrow: its note 'tokenizer' is not UTF-8 text"):
        read_note(path, "tokenizer")
    assert read_note(path, "other") is None
    write_table(path, prompts(5), PROMPT_SCHEMA.with_metadata({"huggingface": "no JSON"}))
    assert len(read_table(path, PROMPT_SCHEMA)) == 5  # what the library datasets would read is not read here


NAN, INFINITE = float("nan"), float("inf")
GOOD = {
    "sft": (
        SFT_SCHEMA,
        {"input_ids": [1, 2], "loss_mask": [False, True], "messages": "[]", "context": "{}", "source": "films"},
    ),
    "preference": (
        PREFERENCE_SCHEMA,
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "margin": None, "source": "films"},
    ),
    "unpaired": (
        UNPAIRED_SCHEMA,
        {"prompt_ids": [1], "completion_ids": [2], "label": False, "mismatched_ids": None, "source": "films"}
        | {"score": None},
    ),
    "prompts": (
        PROMPT_SCHEMA,
        {"prompt_ids": [1], "messages": MESSAGES, "facts": "{}", "context": "{}", "source": "films"},
    ),
    "reference": (REFERENCE_SCHEMA, {"reference_chosen_logps": -1.0, "reference_rejected_logps": 0.0}),
    "tokens": (
        TOKEN_REFERENCE_SCHEMA,
        {"reference_chosen_logps": -1.0, "reference_rejected_logps": 0.0}
        | {"reference_chosen_token_logps": [-0.5, -0.5], "reference_rejected_token_logps": [0.0]},
    ),
}
FAULTS = [
    ("sft", "row", None, "row is null"),
    ("prompts", "row", -1, "row numbers must be 0 or more, and grow"),
    ("preference", "row", 1199, "row numbers must be 0 or more, and grow"),
    ("reference", "row", 7, "row numbers must be 0 or more, and grow"),
    *(
        (kind, column, value, message)
        for kind, column in (
            ("sft", "input_ids"),
            ("sft", "loss_mask"),
            ("prompts", "prompt_ids"),
            ("preference", "prompt_ids"),
            ("preference", "chosen_ids"),
            ("preference", "rejected_ids"),
            ("unpaired", "completion_ids"),
            ("tokens", "reference_chosen_token_logps"),
        )
        for value, message in ((None, "list is null"), ([], "list is empty"), ([None], "list holds a null"))
    ),
    ("sft", "loss_mask", [False, None], "the list holds a null"),
    ("sft", "loss_mask", [True], "the mask has another length than input_ids"),
    ("sft", "loss_mask", [False, True, True], "the mask has another length than input_ids"),
    ("sft", "loss_mask", [False, False], "the mask is false everywhere"),
    ("sft", "loss_mask", [True, True], "the mask is true at the first token"),
    ("sft", "messages", "{}", "expected a list of messages, found dict"),
    ("sft", "context", "[]", "expected an object, found list"),
    ("prompts", "messages", None, "the text is null"),
    ("prompts", "messages", "{}", "expected a list of messages, found dict"),
    ("prompts", "messages", '[{"role": "user"}]', "message 1: expected a message with 'role' and 'content'"),
    ("prompts", "facts", None, "the text is null"),
    ("prompts", "facts", "[]", "expected an object, found list"),
    ("prompts", "facts", "{", "not valid JSON"),
    ("prompts", "context", "[]", "expected an object, found list"),
    ("unpaired", "label", None, "the label is null"),
    ("unpaired", "score", float("nan"), "the score is not a finite number"),
    ("unpaired", "score", float("-inf"), "the score is not a finite number"),
    ("unpaired", "mismatched_ids", [], "the list is empty"),
    ("unpaired", "mismatched_ids", [None], "the list holds a null"),
    ("sft", "source", None, "the text is null"),
    *(("preference", "margin", value, "the margin is not a finite number") for value in (-1.0, NAN, INFINITE)),
    ("reference", "reference_chosen_logps", None, "the log-prob is null"),
    ("reference", "reference_rejected_logps", NAN, "the log-prob is not a finite number"),
    ("reference", "reference_rejected_logps", -INFINITE, "the log-prob is not a finite number"),
    ("reference", "reference_chosen_logps", 0.5, "the log-prob is above 0"),
    ("tokens", "reference_rejected_token_logps", [-1.0, NAN], "the log-prob is not a finite number (of a token)"),
    ("tokens", "reference_rejected_token_logps", [-1.0, 0.5], "the log-prob is above 0 (of a token)"),
]


@pytest.mark.parametrize(("kind", "column", "value", "message"), FAULTS)
@pytest.mark.parametrize("place", [0, 1200])
def test_a_value_that_no_stage_writes_is_named_with_its_row(tmp_path, kind, column, value, message, place):
    schema, row = GOOD[kind]
    rows = [{"row": number, **row} for number in range(1500)]
    write_rows(tmp_path / "good.arrow", rows, schema)
    assert len(read_table(tmp_path / "good.arrow", schema)) == 1500
    if (place, column, value) in ((0, "row", 1199), (0, "row", 7)):
        value = -5
    rows[place] = rows[place] | {column: value}
    write_rows(tmp_path / "bad.arrow", rows, schema)
    with pytest.raises(StageError) as refused:
        read_table(tmp_path / "bad.arrow", schema)
    where = "" if column == "row" else f", row {place}"
    assert str(refused.value).startswith(f"{tmp_path}/bad.arrow{where}, {column}")
    assert message in str(refused.value)
    assert str(refused.value).endswith("; run the stage that writes it again")


def write_rows(path, rows, schema):
    write_table(path, {name: [row[name] for row in rows] for name in schema.names}, schema)


def test_offsets_that_point_outside_are_not_followed(tmp_path):
    path = tmp_path / "t.arrow"
    write_table(path, with_texts({"row": [0, 1], "prompt_ids": [[7, 7], [7]]}), PROMPT_SCHEMA)
    content, offsets = path.read_bytes(), b"".join(number.to_bytes(4, "little") for number in (0, 2, 3))
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, b"".join(number.to_bytes(4, "little") for number in (0, 2, 10**8))))
    with pytest.raises(StageError, match=r"t\.arrow is not an Arrow stream, or is cut short"):
        read_table(path, PROMPT_SCHEMA)
