import csv
import gzip
import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.settings.prepare_data import PrepareData
from tests.real_files import PROJECT, real_file

SECTION = {
    "source": "local",
    "path": "raw",
    "hub_dataset": None,
    "hub_revision": None,
    "hub_data_dir": None,
    "hub_split": None,
    "format": "auto",
    "columns": {},
    "ignore_columns": [],
    "on_unusable_row": "error",
    "kinds": ["sft", "preference", "prompts"],
    "max_rows": None,
    "eval_fraction": 0.25,
    "film_reviews": {
        "sft_rows": 40,
        "preference_rows": 40,
        "prompt_rows": 20,
        "eval_rows": 20,
        "label_temperature": 1.0,
    },
}
FILM_REVIEWS = {"source": "film_reviews", "path": "data/raw/none"}
FILES = [f"{kind}/{split}" for kind in ("sft", "preference", "prompts") for split in ("train", "eval")]


def prepare(folder, raw="raw", seed=17, env=None, **changes):
    """Run the stage in `folder` with the section above and `changes`; returns the finished process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = {"path": str(raw)} if changes.get("source", "local") == "local" else {}
    params = {"seed": seed, "prepare_data": SECTION | path | changes}
    (folder / "params.yaml").write_text(json.dumps(params), encoding="utf-8")  # JSON is YAML too
    arguments = ["--out", "data/prepared", "--metrics", "metrics/prepare_data.json"]
    return subprocess.run(
        [sys.executable, "-m", "stages.prepare_data", *arguments],
        cwd=folder,
        env={**(env or os.environ), "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )


def prepared(process, folder):
    """The prepared rows by 'kind/split', and the metrics, of a run that succeeded."""
    assert process.returncode == 0, process.stderr
    rows = {}
    for name in FILES:
        text = (folder / "data/prepared" / f"{name}.jsonl").read_text(encoding="utf-8")
        rows[name] = [json.loads(line) for line in text.splitlines()]
    return rows, json.loads((folder / "metrics/prepare_data.json").read_text(encoding="utf-8"))


def refused(process, folder, *messages):
    """Assert that the run ended as a user's mistake, with one message and nothing written."""
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in process.stderr
    for message in messages:
        assert message in lines[0]
    written = {path.name for path in folder.rglob("*") if path.is_file()} - {"params.yaml"}
    assert not written - {"raw", "raw.jsonl"}
    assert not list(folder.glob("data/prepared/*"))


def bytes_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_raw(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "raw.jsonl"


def pair(prompt, chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_every_row_is_written_or_counted_by_reason(tmp_path):
    rows = [
        *(pair(f"ask {number}") for number in range(8)),
        pair("ask 0"),  # the same once more
        pair("ask 1", rejected="never"),  # another pair with the same prompt and chosen reply
        pair("ask 2", chosen="surely") | {"margin": 1.5},
        pair("ask 8", chosen=" "),
        pair("ask 9", rejected=None),
        pair("ask 10", chosen="no"),
    ]
    rows_of, metrics = prepared(prepare(tmp_path, write_raw(tmp_path, rows)), tmp_path)
    assert metrics == {
        "raw_rows": 14,
        "dropped/duplicate": 1,
        "dropped/empty_reply": 2,
        "dropped/equal_replies": 1,
        **{f"{name}_rows": len(rows_of[name]) for name in FILES},
    }
    totals = {
        kind: len(rows_of[f"{kind}/train"] + rows_of[f"{kind}/eval"]) for kind in ("sft", "preference", "prompts")
    }
    assert totals == {"sft": 9, "preference": 10, "prompts": 8}
    assert len(rows_of["prompts/eval"]) == 2
    with_margin = [row for row in rows_of["preference/train"] + rows_of["preference/eval"] if "margin" in row]
    assert with_margin == [
        {
            "prompt": [{"role": "user", "content": "ask 2"}],
            "chosen": [{"role": "assistant", "content": "surely"}],
            "rejected": [{"role": "assistant", "content": "no"}],
            "margin": 1.5,
        }
    ]
    asked = {"role": "user", "content": "ask 3"}
    assert {"messages": [asked, {"role": "assistant", "content": "yes"}]} in rows_of["sft/train"] + rows_of["sft/eval"]


def test_no_prompt_is_on_both_sides_in_any_kind(tmp_path):
    spellings = ("what is {}?", "What is {}?", " what  is\n{}? ")
    rows = [pair(form.format(number), rejected=form) for number in range(30) for form in spellings]
    rows_of, _ = prepared(prepare(tmp_path, write_raw(tmp_path, rows)), tmp_path)

    def questions(split):
        kinds = (rows_of[f"sft/{split}"], rows_of[f"preference/{split}"], rows_of[f"prompts/{split}"])
        texts = [row.get("prompt", row.get("messages"))[0]["content"] for kind in kinds for row in kind]
        return {"".join(filter(str.isdigit, text)) for text in texts}

    assert questions("train") | questions("eval") == {str(number) for number in range(30)}
    assert not questions("train") & questions("eval")
    assert len(questions("eval")) == 8  # a quarter of 30, rounded to even
    assert len(rows_of["preference/eval"]) == 24


def test_a_second_run_writes_the_same_bytes_and_another_seed_other_splits(tmp_path):
    raw = [pair(f"ask {number}") for number in range(40)]
    runs = {"first": 17, "second": 17, "other": 18}
    for name, seed in runs.items():
        prepared(prepare(tmp_path / name, write_raw(tmp_path / name, raw), seed=seed), tmp_path / name)
    first, second, other = (bytes_below(tmp_path / name / "data") for name in runs)
    assert first == second
    assert first != other
    prepared(prepare(tmp_path / "first", "raw.jsonl"), tmp_path / "first")
    assert bytes_below(tmp_path / "first/data") == first


def test_rows_are_limited_and_columns_renamed(tmp_path):
    raw = [{"query": f"ask {number}", "good": "yes", "bad": "no"} for number in range(9)]
    columns = {"query": "prompt", "good": "chosen", "bad": "rejected"}
    changes = {"columns": columns, "max_rows": 5}
    rows_of, metrics = prepared(prepare(tmp_path, write_raw(tmp_path, raw), **changes), tmp_path)
    assert metrics["raw_rows"] == 5
    prompts = [row["prompt"][0]["content"] for row in rows_of["preference/train"] + rows_of["preference/eval"]]
    assert sorted(prompts) == [f"ask {number}" for number in range(5)]


def test_replies_without_pairs_make_the_kinds_asked_for_only(tmp_path):
    raw = write_raw(tmp_path, [{"instruction": f"ask {number}", "output": "yes"} for number in range(8)])
    message = "raw.jsonl, line 1: format 'alpaca' has no rejected replies, so kind 'preference' cannot be made"
    refused(prepare(tmp_path, raw), tmp_path, message)
    rows_of, metrics = prepared(prepare(tmp_path, raw, kinds=["sft", "prompts"]), tmp_path)
    assert (len(rows_of["sft/train"]), len(rows_of["sft/eval"])) == (6, 2)
    assert rows_of["preference/train"] == rows_of["preference/eval"] == []
    assert metrics["preference/train_rows"] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "raw.jsonl is empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n', "raw.jsonl, line 2: not valid JSON"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "rejected": "c"}\n',
            "raw.jsonl, line 2: format 'preference' needs the column 'chosen', found prompt, rejected",
        ),
        (
            '{"prompt": "a", "chosen": "", "rejected": "c"}\n{"prompt": "a", "chosen": "c", "rejected": "c"}\n',
            "raw.jsonl: all 2 rows were dropped (empty_reply 1, equal_replies 1)",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "1 distinct prompt is left"),
        ('{"text": "a"}\n', "raw.jsonl, line 1: columns text fit no format"),
    ],
)
def test_bad_data_is_one_message_and_nothing_is_written(tmp_path, content, message):
    (tmp_path / "raw.jsonl").write_text(content, encoding="utf-8")
    refused(prepare(tmp_path, "raw.jsonl"), tmp_path, message)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "INTEGER"}, "line 9: not usable JSON (an integer of more digits than Python reads)"),
        ({"id": "BRACKETS"}, "line 9: not usable JSON (brackets nested too deeply)"),
        ({"margin": "MARGIN"}, "line 9, 'margin': expected a finite number of at least 0"),
        ({"margin": -1}, "line 9, 'margin': expected a finite number of at least 0"),
        ({"margin": 1e39}, "line 9, 'margin': expected a finite number of at least 0"),
        ({"prompt": [{"role": ["user"], "content": "a"}]}, "line 9, 'prompt', message 1: a role that is list"),
        ({"prompt": [{"role": {}, "content": "a"}]}, "line 9, 'prompt', message 1: a role that is dict"),
        ({"prompt": [{"role": "us\ner", "content": "a"}]}, "line 9, 'prompt', message 1: unknown role 'us\\ner'"),
        ({"prompt": True}, "line 9, 'prompt': expected text, found bool"),
        ({"chosen": 5}, "line 9, 'chosen': expected text, found int"),
        ({"tools": "[]", "a\nb": 1}, "line 9: the column 'tools' (format 'preference') is read by nothing here"),
        ({"conversations": []}, "line 9: columns prompt, chosen, rejected, conversations could be of the formats"),
        ({"system": {"a": 1}}, "line 9, 'system': expected text, found dict"),
        ({"prompt": [{"role": "user", "content": "a", "weight": 0}]}, "line 9, 'prompt', message 1: the key 'weight'"),
    ],
)
def test_a_bad_row_after_good_ones_is_one_message(tmp_path, row, message):
    write_raw(tmp_path, [*(pair(f"ask {number}") for number in range(8)), pair("ask 8") | row])
    text = (tmp_path / "raw.jsonl").read_text(encoding="utf-8")
    long = {"INTEGER": "9" * 4301, "BRACKETS": "[" * 100_000, "MARGIN": "9" * 401}
    for name, value in long.items():
        text = text.replace(f'"{name}"', value)
    (tmp_path / "raw.jsonl").write_text(text, encoding="utf-8")
    refused(prepare(tmp_path, "raw.jsonl"), tmp_path, message)


def conversation(*turns):
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]


def test_unusable_rows_end_the_stage_or_are_counted_each_by_its_reason(tmp_path):
    asked, told = conversation("ask", "yes")
    unusable = {
        "unsupported_role": [
            [asked, {"role": role, "content": "x"}, told] for role in ("tool", "developer", "function")
        ],
        "content_not_text": [[{"role": "user", "content": [{"type": "text", "text": "x"}]}, told]],
        "not_messages": ["ask", [asked, {"from": "gpt", "value": "yes"}]],
    }
    rows = [{"messages": conversation(f"ask {number}", "yes")} for number in range(8)]
    for reason, conversations in unusable.items():
        for number, messages in enumerate(conversations):
            folder = tmp_path / f"{reason}-{number}"
            raw = write_raw(folder, [*rows, {"messages": messages}])
            ended = prepare(folder, raw, kinds=["sft"], format="messages")
            refused(ended, folder, "line 9", "prepare_data.on_unusable_row: drop leaves such rows out")
            kept = prepared(prepare(folder, raw, kinds=["sft"], format="messages", on_unusable_row="drop"), folder)
            expected = "messages_as_text" if messages == "ask" else reason
            assert {key: count for key, count in kept[1].items() if "dropped" in key} == {f"dropped/{expected}": 1}
            assert len(kept[0]["sft/train"] + kept[0]["sft/eval"]) == 8


def test_what_the_rules_drop_is_dropped_whatever_is_said_of_unusable_rows(tmp_path):
    rows = [{"messages": conversation(f"ask {number}", "yes")} for number in range(8)]
    rows += [rows[0], {"messages": conversation("ask")}, {"messages": conversation("ask", "")}, {"messages": []}]
    _, metrics = prepared(prepare(tmp_path, write_raw(tmp_path, rows), kinds=["sft"]), tmp_path)
    dropped = {key: count for key, count in metrics.items() if "dropped" in key}
    assert dropped == {"dropped/duplicate": 1, "dropped/ends_with_user": 1, "dropped/empty_reply": 2}


def test_columns_that_say_something_are_ignored_by_name_only(tmp_path):
    rows = [pair(f"ask {number}") | {"score": number, "id": number} for number in range(8)]
    rows[5]["chosen"] = [{"role": "assistant", "content": "yes", "weight": 0}]
    raw = write_raw(tmp_path, rows)
    refused(prepare(tmp_path, raw), tmp_path, "line 1: the column 'score'", "prepare_data.ignore_columns")
    refused(prepare(tmp_path, raw, ignore_columns=["score"]), tmp_path, "line 6, 'chosen', message 1: the key 'weight'")
    wrong = prepare(tmp_path, raw, ignore_columns=["score", "weight", "sore"])
    refused(wrong, tmp_path, "prepare_data.ignore_columns names 'sore', which no row has; did you mean 'score'?")
    process = prepare(tmp_path, raw, ignore_columns=["score", "weight"])
    rows_of, _ = prepared(process, tmp_path)
    assert len(rows_of["preference/train"] + rows_of["preference/eval"]) == 8
    told = "format preference; columns read: chosen, prompt, rejected; not read: id; ignored by name: score, weight"
    assert told in process.stdout.splitlines()


def test_files_of_another_format_in_a_folder_are_not_read_as_the_first(tmp_path):
    write_raw(
        tmp_path / "raw", [{"chosen": f"ask {number} yes", "rejected": f"ask {number} no"} for number in range(9)]
    )
    lines = "".join(json.dumps(pair(f"ask {number}")) + "\n" for number in range(10, 15))
    (tmp_path / "raw/second.jsonl").write_text(lines, encoding="utf-8")
    process = prepare(tmp_path, "raw")
    assert process.returncode == 2
    assert "raw/second.jsonl, line 1: the row is of format 'preference', and raw/raw.jsonl, line 1 of" in process.stderr


def test_a_csv_of_conversations_is_read_as_the_same_rows_of_json_are(tmp_path):
    rows = [
        {"prompt": conversation(f"ask {number}"), "chosen": [{"role": "assistant", "content": "yes"}]}
        | {"rejected": [{"role": "assistant", "content": "no"}], "system": "Be brief.", "margin": number or None}
        for number in range(8)
    ]
    (tmp_path / "csv").mkdir()
    with (tmp_path / "csv/raw.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        for row in rows:
            table.writerow({key: json.dumps(cell) if isinstance(cell, list) else cell for key, cell in row.items()})
    from_csv = prepared(prepare(tmp_path / "csv", "raw.csv"), tmp_path / "csv")
    from_json = prepared(prepare(tmp_path / "json", write_raw(tmp_path / "json", rows)), tmp_path / "json")
    assert from_csv == from_json
    row = from_json[0]["preference/train"][0]
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert "margin" in from_json[0]["preference/train"][1]


def test_conversations_that_go_on_from_one_another_stand_on_one_side(tmp_path):
    talks = [[f"ask {n}", "yes", f"more {n}", "no", "end", "good"][:length] for n in range(12) for length in (2, 4, 6)]
    talks[0][0], talks[1][0] = "ＡＳＫ  0", "ask\u00a00"
    raw = write_raw(tmp_path, [{"messages": conversation(*talk)} for talk in talks])
    rows_of, metrics = prepared(prepare(tmp_path, raw, kinds=["sft", "prompts"]), tmp_path)
    assert metrics["sft/eval_rows"] == metrics["prompts/eval_rows"] == 9  # a quarter, in whole groups of three
    numbers = {
        split: {
            unicodedata.normalize("NFKC", row["messages"][0]["content"]).split()[1] for row in rows_of[f"sft/{split}"]
        }
        for split in ("train", "eval")
    }
    assert len(numbers["eval"]) == 3
    assert not numbers["train"] & numbers["eval"]


def test_what_was_there_stays_when_a_run_fails(tmp_path):
    raw = write_raw(tmp_path, [pair(f"ask {number}") for number in range(8)])
    prepared(prepare(tmp_path, raw), tmp_path)
    before = bytes_below(tmp_path / "data")
    (tmp_path / raw).write_text("{", encoding="utf-8")
    assert prepare(tmp_path, raw).returncode == 2
    assert bytes_below(tmp_path / "data") == before


COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = {"source": "hub", "path": "data/raw/none", "hub_dataset": "owner/name", "hub_revision": COMMIT}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "film_reviews"}, "path must be a file or folder with source local"),
        ({"path": "data/raw/none"}, "path must be a file or folder with source local"),
        ({"hub_data_dir": "a"}, "hub_data_dir must be null with source local"),
        (HUB | {"hub_dataset": None}, "hub_dataset must be owner/name"),
        (HUB | {"hub_revision": None}, "hub_revision must be a full commit hash of 40 hexadecimal digits, found None"),
        (HUB | {"hub_revision": "main"}, "hub_revision must be a full commit hash of 40 hexadecimal digits"),
        (HUB | {"hub_revision": COMMIT[:-1]}, "hub_revision must be a full commit hash of 40 hexadecimal digits"),
        (FILM_REVIEWS | {"max_rows": 5}, "with source film_reviews leave them unset"),
        (FILM_REVIEWS | {"format": "hh"}, "with source film_reviews leave them unset"),
        ({"columns": {"a": "prompt", "b": "prompt"}}, "columns gives two columns the same name"),
        ({"kinds": []}, "kinds must name at least one kind"),
        ({"kinds": ["sft", "sft"]}, "kinds must name at least one kind, and each once"),
        ({"kinds": ["sfd"]}, "did you mean 'sft'?"),
        ({"format": "preferences"}, "did you mean 'preference'?"),
        ({"max_rows": 1}, "max_rows must be at least 2, found 1"),
        ({"max_rows": 99999999999999999999}, "max_rows must be at"),
        ({"path": "data/raw/link/../x"}, "path must not go up with .. from a folder that it names"),
        ({"path": "$(touch pwned)/../data/raw/none"}, "path must not go up with .. from a folder that it names"),
        (FILM_REVIEWS | {"ignore_columns": ["a"]}, "with source film_reviews leave them [] and error"),
        (FILM_REVIEWS | {"on_unusable_row": "drop"}, "with source film_reviews leave them [] and error"),
        ({"columns": {"a": "promt"}}, "the name 'promt', which no format reads; did you mean 'prompt'?"),
        ({"columns": {"": "x"}}, "prepare_data"),
        ({"ignore_columns": ["a", "a"]}, "ignore_columns names a column twice"),
        ({"ignore_columns": ["a"], "columns": {"a": "prompt"}}, "'a' is in columns and in ignore_columns: choose one"),
        ({"eval_fraction": 0}, "eval_fraction must be above 0 and below 1, found 0"),
        ({"eval_fraction": 1.0}, "eval_fraction must be above 0 and below 1, found 1.0"),
    ],
)
def test_contradictory_settings_are_refused(changes, message):
    with pytest.raises(StageError) as caught:
        build(PrepareData, SECTION | changes, "params.yaml: prepare_data")
    assert "params.yaml: prepare_data" in str(caught.value)
    assert message in str(caught.value)


def test_film_reviews_are_generated_the_same_each_time(tmp_path):
    for name in ("first", "second"):
        process = prepare(tmp_path / name, "data/raw/none", **FILM_REVIEWS)
        rows_of, metrics = prepared(process, tmp_path / name)
    assert bytes_below(tmp_path / "first/data") == bytes_below(tmp_path / "second/data")
    assert {name: len(rows_of[name]) for name in FILES} == {name: metrics[f"{name}_rows"] for name in FILES}
    assert all(rows_of[name] for name in FILES)
    assert 0.5 < metrics["bayes_accuracy"] <= 1


def test_real_human_preferences(tmp_path):
    """Counts from the file itself, with no code of ours but the rule: the last marker ends the prompt."""
    raw = real_file("data/hh-rlhf")
    process = prepare(tmp_path, raw.resolve(), eval_fraction=0.1)
    rows_of, metrics = prepared(process, tmp_path)
    with gzip.open(raw / "harmless-base/test.jsonl.gz", "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    split = [[row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")] for row in pairs]
    reasons = Counter(
        "empty"
        if not (chosen[2].strip() and rejected[2].strip())
        else "mismatch"
        if chosen[0] != rejected[0]
        else "kept"
        for chosen, rejected in split
    )
    assert metrics["raw_rows"] == 2312
    assert metrics["dropped/empty_reply"] == reasons["empty"] == 4
    assert metrics["dropped/prompt_mismatch"] == reasons["mismatch"] == 5
    # Of the rows left, four hold two turns in a row of one role.
    assert metrics["dropped/not_alternating"] == 4
    kept = len(rows_of["preference/train"] + rows_of["preference/eval"])
    assert kept == reasons["kept"] - 4 == 2299
    assert len(rows_of["prompts/eval"]) == 230
    replies = {(chosen[2].strip(), rejected[2].strip()) for chosen, rejected in split}
    held_out = {json.dumps(row["prompt"])[:-1] for row in rows_of["prompts/eval"]}
    told = [json.dumps(row["messages"]) for row in rows_of["sft/train"]]
    assert not [asked for asked in held_out if any(text.startswith(asked) for text in told)]
    trained = {json.dumps(row["prompt"])[:-1] for row in rows_of["prompts/train"]}
    assert not [row for row in rows_of["sft/eval"] if any(json.dumps(row["messages"]).startswith(t) for t in trained)]
    for row in rows_of["preference/eval"]:
        assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) in replies
        assert row["prompt"][-1]["role"] == "user"
