"""One source read: its rows, its record, and what is refused, dropped and counted."""

import csv
import json
import os
import subprocess
import sys

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.settings.declaration import block
from stages.lib.settings.reading import TreeComparison, WinnerComparison
from stages.lib.settings.sources import Sources
from tests.real_files import PROJECT, real_file
from tests.stages.data_stages import read, settings, sources_of, write_rows

PAIRS = ["sft", "preference", "prompts"]


def pair(prompt, chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def conversation(*turns):
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


def source(folder, rows, **keys):
    """A folder with one source of files, named own."""
    path = rows if isinstance(rows, str) else write_rows(folder / "raw.jsonl", rows)
    settings(folder, sources_of(files={"own": {"path": path, "kinds": ["sft"], **keys}}))
    return folder


def read_rows(folder, rows, **keys):
    return read(source(folder, rows, **keys), "own")


def refused(folder, rows, **keys):
    """The message with which a source is refused; nothing is written."""
    with pytest.raises(StageError) as caught:
        read_rows(folder, rows, **keys)
    assert not list(folder.glob("data/sources/*/*"))
    assert not list(folder.glob("metrics/read_source/*"))
    return str(caught.value)


def test_a_pair_serves_every_kind_by_hand(tmp_path):
    rows, metrics, record = read_rows(
        tmp_path, [pair("ask 1", "surely", "no") | {"margin": 1.5}, pair("ask 2", " ")], kinds=[*PAIRS, "unpaired"]
    )
    asked = {"role": "user", "content": "ask 1"}
    surely, no = ({"role": "assistant", "content": text} for text in ("surely", "no"))
    assert rows == [
        {"kind": "sft", "messages": [asked, surely]},
        {"kind": "preference", "prompt": [asked], "chosen": [surely], "rejected": [no], "margin": 1.5},
        {"kind": "prompts", "prompt": [asked]},
        {"kind": "unpaired", "prompt": [asked], "completion": [surely], "label": True},
        {"kind": "unpaired", "prompt": [asked], "completion": [no], "label": False},
    ]
    assert metrics == {
        "rows_read": 2,
        "rows_kept": 1,
        "dropped/empty_reply": 1,
        "sft/rows": 1,
        "sft/prompt_characters_max": 5,
        "sft/prompt_characters_mean": 5.0,
        "sft/reply_characters_max": 6,
        "sft/reply_characters_mean": 6.0,
        "preference/rows": 1,
        "preference/prompt_characters_max": 5,
        "preference/prompt_characters_mean": 5.0,
        "preference/reply_characters_max": 6,
        "preference/reply_characters_mean": 4.0,
        "prompts/rows": 1,
        "prompts/prompt_characters_max": 5,
        "prompts/prompt_characters_mean": 5.0,
        "unpaired/rows": 2,
        "unpaired/prompt_characters_max": 5,
        "unpaired/prompt_characters_mean": 5.0,
        "unpaired/reply_characters_max": 6,
        "unpaired/reply_characters_mean": 4.0,
    }
    assert record.startswith(
        "Source own\n\nformat preference: the only one that its columns allow\n"
        "columns read: chosen, margin, prompt, rejected\n\n"
    )
    shown = record.partition("The first row of kind unpaired:\n\n")[2]
    assert json.loads(shown) == rows[3]


def test_unpaired_replies_serve_sft_by_the_good_ones(tmp_path):
    raw = [{"prompt": f"ask {n}", "completion": "yes", "label": n % 2 == 0} for n in range(4)]
    rows, metrics, _ = read_rows(tmp_path, raw, kinds=["unpaired", "sft"])
    assert [row["label"] for row in rows if row["kind"] == "unpaired"] == [True, False, True, False]
    assert [row["messages"][0]["content"] for row in rows if row["kind"] == "sft"] == ["ask 0", "ask 2"]
    assert (metrics["sft/rows"], metrics["unpaired/rows"]) == (2, 4)


def test_texts_serve_whole_text_training_and_raw_prompts(tmp_path):
    rows, metrics, _ = read_rows(tmp_path, [{"text": "Once upon"}], kinds=["sft", "prompts"], split="train")
    assert rows == [{"kind": kind, "split": "train", "text": "Once upon"} for kind in ("sft", "prompts")]
    assert (metrics["sft/text_characters_max"], metrics["prompts/prompt_characters_max"]) == (9, 9)
    message = refused(tmp_path / "pairs", [{"text": "a"}], kinds=["unpaired"])
    assert "line 1: a text without roles serves sft and prompts, not unpaired" in message


def test_the_split_of_a_source_stands_in_its_rows(tmp_path):
    rows, _, _ = read_rows(tmp_path, [pair("a")], kinds=PAIRS, split="test")
    assert {row["split"] for row in rows} == {"test"}


def test_columns_ride_on_as_facts(tmp_path):
    raw = [{"q": "1 + 1?", "answer": "2", "id": 7, "level": None, "other": "x"}]
    rows, _, record = read_rows(
        tmp_path, raw, columns={"q": "prompt"}, facts=["answer", "id", "level"], kinds=["prompts"], format="prompt"
    )
    (row,) = rows
    assert row["facts"] == {"answer": "2", "id": 7, "level": None}
    assert row["prompt"] == [{"role": "user", "content": "1 + 1?"}]
    assert "columns read: prompt (from q)\nfacts: answer, id, level\nnot read: other\n" in record
    message = refused(tmp_path / "b", raw, columns={"q": "prompt"}, facts=["anser"], kinds=["prompts"], format="prompt")
    assert "line 1: no column 'anser' for facts, found q, answer, id, level, other" in message


def test_prompts_of_a_task_are_graded_by_their_facts(tmp_path):
    facts = {"film": "iron garden", "genre": "war", "aspect": "plot"}
    raw = [{"prompt": "how is it?", **facts}]
    keys = {"task": "film_reviews", "kinds": ["prompts"], "format": "prompt"}
    rows, _, _ = read_rows(tmp_path, raw, facts=[*facts], **keys)
    assert rows[0]["facts"] == {**facts, "task": "film_reviews"}
    message = refused(tmp_path / "b", raw, facts=["film", "genre"], **keys)
    assert message.startswith(f"{tmp_path / 'b'}/raw.jsonl, line 1: ")
    assert "name the columns that hold them in the source's facts" in message


def test_rows_are_limited_and_columns_renamed(tmp_path):
    raw = [{"query": f"ask {number}", "good": "yes", "bad": "no"} for number in range(9)]
    columns = {"query": "prompt", "good": "chosen", "bad": "rejected"}
    rows, metrics, record = read_rows(tmp_path, raw, columns=columns, max_rows=5, kinds=["prompts"])
    assert (metrics["rows_read"], len(rows)) == (5, 5)
    assert "columns read: chosen (from good), prompt (from query), rejected (from bad)\n" in record


@pytest.mark.parametrize(
    ("better", "message"),
    [
        ("better_response_id", "the column 'better_response_id' may say which of the two replies is better"),
        ("x", "the column 'x' may say which of the two replies is better"),
    ],
)
def test_two_responses_beside_a_winner_are_never_taken_in_one_order(tmp_path, better, message):
    raw = [{"prompt": f"ask {n}", "a": "yes", "b": "no", better: n % 2} for n in range(4)]
    assert "describe that in comparison" in refused(tmp_path, raw, kinds=["preference"])
    keys = {"columns": {"a": "chosen", "b": "rejected"}, "kinds": ["preference"]}
    assert message in refused(tmp_path, raw, **keys)
    comparison = {"type": "winner", "responses": ["a", "b"], "text_key": None, "winner": [better], "first": [0]}
    comparison |= {"second": [1], "tie": [], "names": []}
    comparison |= {"pairs": "all", "least_gap": 0.0, "ties": "drop", "margin": "none"}
    rows, _, record = read_rows(tmp_path, raw, comparison=comparison, kinds=["preference"])
    assert [row["chosen"][0]["content"] for row in rows] == ["yes", "no", "yes", "no"]
    assert f"columns read: {', '.join(sorted(['a', 'b', better, 'prompt']))}\n" in record
    assert "format comparison: described in params.yaml as winner\n" in record


@pytest.mark.parametrize("on_unusable_row", ["error", "drop"])
def test_an_unknown_vote_ends_the_run_whatever_becomes_of_unusable_rows(tmp_path, on_unusable_row):
    raw = [{"prompt": f"ask {n}", "a": "yes", "b": "no", "won": 1 + n % 2} for n in range(4)]  # counts from 1
    comparison = block(WinnerComparison, responses=["a", "b"], winner=["won"])
    keys = {"kinds": ["preference"], "on_unusable_row": on_unusable_row}
    message = refused(tmp_path, raw, comparison=comparison, **keys)
    assert "line 2, 'won': the vote '2' (of '2') is known for neither response: first is 0, second 1, tie" in message
    assert "drop" not in message
    comparison |= {"first": [1], "second": [2]}
    rows, _, _ = read_rows(tmp_path, raw, comparison=comparison, **keys)
    assert [row["chosen"][0]["content"] for row in rows] == ["yes", "no", "yes", "no"]


def test_a_flat_file_of_ranked_replies_is_read_as_trees(tmp_path):
    def message(name, parent, role, text, rank=None):
        return {"id": name, "parent": parent, "role": role, "text": text, "rank": rank}

    raw = [
        message("q", None, "prompter", "Hi?"),
        message("b", "q", "assistant", "worse", 1),
        message("a", "q", "assistant", "better", 0),
    ]
    comparison = {"type": "tree", "root": None, "text_key": "text", "role_key": "role", "replies_key": "replies"}
    comparison |= {"rank_key": "rank", "best": "lowest", "id_key": "id", "parent_key": "parent"}
    comparison |= {"pairs": "all", "least_gap": 0.0, "ties": "drop", "margin": "none"}
    rows, _, _ = read_rows(tmp_path, raw, comparison=comparison, kinds=["preference"])
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == [("better", "worse")]


def test_a_kind_that_the_rows_cannot_serve_is_named(tmp_path):
    alpaca = [{"instruction": "ask", "output": "yes"}]
    message = "line 1: the row has no rejected reply, and so cannot serve preference; leave that out of"
    assert message in refused(tmp_path / "a", alpaca, kinds=["preference"])
    assert "line 1: nothing says whether the reply is a good one" in refused(tmp_path, alpaca, kinds=["unpaired"])
    prompts = [{"prompt": "a"}]
    message = refused(tmp_path, prompts, kinds=["sft"], format="prompt")
    assert "line 1: the row has a prompt and no reply, and so cannot serve sft" in message


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
            "sources.files.own: all 2 rows were dropped (empty_reply 1, equal_replies 1)",
        ),
        ('{"body": "a"}\n', "raw.jsonl, line 1: columns body fit no format"),
    ],
)
def test_bad_data_is_one_message_and_nothing_is_written(tmp_path, content, message):
    (tmp_path / "raw.jsonl").write_text(content, encoding="utf-8")
    assert message in refused(tmp_path, str(tmp_path / "raw.jsonl"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "INTEGER"}, "line 9: not usable JSON (an integer of more digits than Python reads)"),
        ({"id": "BRACKETS"}, "line 9: not usable JSON (brackets nested too deeply)"),
        ({"margin": "MARGIN"}, "line 9, 'margin': expected a finite number of at least 0"),
        ({"margin": -1}, "line 9, 'margin': expected a finite number of at least 0"),
        ({"prompt": [{"role": ["user"], "content": "a"}]}, "line 9, 'prompt', message 1: a role that is list"),
        ({"prompt": [{"role": "us\ner", "content": "a"}]}, "line 9, 'prompt', message 1: unknown role 'us\\ner'"),
        ({"prompt": True}, "line 9, 'prompt': expected text, found bool"),
        ({"chosen": 5}, "line 9, 'chosen': expected text, found int"),
        ({"images": ["a.png"]}, "line 9: the column 'images' (format 'preference') is read by nothing here"),
        ({"system": {"a": 1}}, "line 9, 'system': expected text, found dict"),
        ({"prompt": [{"role": "user", "content": "a", "train": False}]}, "message 1: the key 'train'"),
    ],
)
def test_a_bad_row_after_good_ones_is_one_message(tmp_path, row, message):
    path = tmp_path / "raw.jsonl"
    write_rows(path, [*(pair(f"ask {number}") for number in range(8)), pair("ask 8") | row])
    text = path.read_text(encoding="utf-8")
    long = {"INTEGER": "9" * 4301, "BRACKETS": "[" * 100_000, "MARGIN": "9" * 401}
    for name, value in long.items():
        text = text.replace(f'"{name}"', value)
    path.write_text(text, encoding="utf-8")
    assert message in refused(tmp_path, str(path), kinds=PAIRS)


def test_unusable_rows_end_the_stage_or_are_counted_each_by_its_reason(tmp_path):
    asked, told = conversation("ask", "yes")
    unusable = {
        "unsupported_role": [asked, {"role": "oracle", "content": "x"}, told],
        "content_not_text": [{"role": "user", "content": [{"type": "image_url"}]}, told],
        "not_messages": [asked, {"speaker": "gpt", "said": "yes"}],
    }
    rows = [{"messages": conversation(f"ask {number}", "yes")} for number in range(8)]
    for reason, messages in unusable.items():
        message = refused(tmp_path / reason, [*rows, {"messages": messages}])
        assert "line 9" in message
        assert "sources.files.own.on_unusable_row: drop leaves such rows out" in message
        kept, metrics, _ = read_rows(tmp_path / reason, [*rows, {"messages": messages}], on_unusable_row="drop")
        assert {key: count for key, count in metrics.items() if "dropped" in key} == {f"dropped/{reason}": 1}
        assert len(kept) == 8


def test_what_the_rules_drop_is_dropped_whatever_is_said_of_unusable_rows(tmp_path):
    rows = [{"messages": conversation(*talk)} for talk in (("ask", "yes"), ("ask", ""))] + [{"messages": []}]
    _, metrics, _ = read_rows(tmp_path, rows)
    assert {key: count for key, count in metrics.items() if "dropped" in key} == {"dropped/empty_reply": 2}


def test_columns_that_say_something_are_ignored_by_name_only(tmp_path):
    rows = [{"instruction": f"ask {n}", "output": "yes", "score": n, "id": n} for n in range(3)]
    assert "line 1: the column 'score' (format 'alpaca') is read by nothing here" in refused(tmp_path, rows)
    message = refused(tmp_path, rows, ignore_columns=["score", "sore"])
    assert message == "sources.files.own.ignore_columns names 'sore', which no row has; did you mean 'score'?"
    _, _, record = read_rows(tmp_path, rows, ignore_columns=["score"])
    assert "columns read: instruction, output\nnot read: id\nignored by name: score\n" in record


def test_rows_that_serve_no_kind_are_counted(tmp_path):
    raw = [{"prompt": f"ask {n}", "completion": "yes", "label": n % 3 > 0} for n in range(9)]
    rows, metrics, record = read_rows(tmp_path / "a", raw, kinds=["sft"])
    assert len(rows) == metrics["sft/rows"] == 6
    assert (metrics["rows_read"], metrics["rows_kept"], metrics["serve_no_kind"]) == (9, 9, 3)
    assert "serve_no_kind 3\n" in record
    _, metrics, _ = read_rows(tmp_path / "b", raw, kinds=["sft", "unpaired"])
    assert "serve_no_kind" not in metrics
    message = refused(tmp_path / "c", [row | {"label": False} for row in raw], kinds=["sft"])
    assert message == "sources.files.own: no row serves the kinds sft: by its label no reply is a good one"


def test_a_margin_that_no_kind_uses_is_refused_until_it_is_ignored(tmp_path):
    rows = [pair("ask") | {"margin": 1.5}]
    message = refused(tmp_path, rows, kinds=["sft", "prompts"])
    assert "line 1: the column 'margin' (a margin, and kinds without preference) is read by nothing here" in message
    read_rows(tmp_path / "a", rows, kinds=["sft"], ignore_columns=["margin"])
    assert read_rows(tmp_path / "b", rows, kinds=["preference"])[0][0]["margin"] == 1.5
    read_rows(tmp_path / "c", [pair("ask") | {"margin": None}], kinds=["sft"])
    renamed = [pair("ask") | {"gap": 1.5}]
    assert "line 1: the column 'gap' (a margin" in refused(tmp_path, renamed, columns={"gap": "margin"})
    comparison = block(WinnerComparison, responses=["chosen", "rejected"], winner=["won"], margin="gap")
    message = refused(tmp_path, [pair("ask") | {"won": 0}], comparison=comparison)
    assert "comparison.margin: gap gives pairs a margin: serve preference, or make it none" in message


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": conversation("ask"), "completion": "yes"}, {"messages": "prompt"}),
        ({"messages": conversation("ask"), "response": "yes"}, {"messages": "prompt", "response": "completion"}),
    ],
)
def test_where_all_rows_lack_a_reply_the_column_that_may_hold_it_is_named(tmp_path, row, columns):
    told = ", ".join(f"{own}: {ours}" for own, ours in columns.items())
    unread = next(column for column in row if column != "messages")
    assert refused(tmp_path, [row]) == (
        f"sources.files.own: all 1 rows were dropped (ends_with_user 1); the column '{unread}', which format messages "
        f"does not read, may hold the reply: columns: {{{told}}} reads it after its prompt"
    )
    rows, _, _ = read_rows(tmp_path, [row], columns=columns)
    assert rows == [{"kind": "sft", "messages": conversation("ask", "yes")}]


def test_a_tree_s_record_names_the_keys_that_are_not_read_alone(tmp_path):
    def message(role, text, *replies, **keys):
        return {"role": role, "text": text, "replies": [*replies], **keys}

    replies = [message("assistant", text, rank=rank) for rank, text in enumerate(("better", "worse"))]
    tree = message("prompter", "Hi?", *replies, rank=None, deleted=False, lang="en")
    comparison = block(TreeComparison)
    _, _, record = read_rows(tmp_path, [{"prompt": tree}], comparison=comparison, kinds=["preference"])
    assert "columns read: prompt\nkeys of messages not read: lang\n" in record


def test_files_of_another_format_in_a_folder_are_not_read_as_the_first(tmp_path):
    write_rows(tmp_path / "raw/a.jsonl", [{"chosen": f"ask {n} yes", "rejected": f"ask {n} no"} for n in range(9)])
    write_rows(tmp_path / "raw/b.jsonl", [pair("ask")])
    message = refused(tmp_path, str(tmp_path / "raw"))
    assert "raw/b.jsonl, line 1: the row is of format 'preference', and" in message


def test_a_csv_of_conversations_is_read_as_the_same_rows_of_json_are(tmp_path):
    rows = [
        {"prompt": conversation(f"ask {number}"), "chosen": [{"role": "assistant", "content": "yes"}]}
        | {"rejected": [{"role": "assistant", "content": "no"}], "system": "Be brief.", "margin": number or None}
        for number in range(8)
    ]
    for name, delimiter in (("comma.csv", ","), ("semicolon.csv", ";"), ("tab.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            table.writeheader()
            for row in rows:
                table.writerow({key: json.dumps(cell) if isinstance(cell, list) else cell for key, cell in row.items()})
    from_json = read_rows(tmp_path / "json", rows, kinds=PAIRS)
    for name in ("comma.csv", "semicolon.csv", "tab.tsv"):
        assert read_rows(tmp_path / name.partition(".")[0], str(tmp_path / name), kinds=PAIRS) == from_json
    assert [turn["role"] for turn in from_json[0][1]["prompt"]] == ["system", "user"]


def test_what_was_there_stays_when_a_run_fails(tmp_path):
    read_rows(tmp_path, [pair("a")])
    before = (tmp_path / "data/sources/own/rows.jsonl").read_bytes()
    with pytest.raises(StageError):
        read_rows(tmp_path, [pair("b"), {}])
    assert (tmp_path / "data/sources/own/rows.jsonl").read_bytes() == before


def test_a_long_row_is_shown_in_part_and_harmless(tmp_path):
    answer = "\x1b[31m\u202e" + "x" * 5000
    _, _, record = read_rows(tmp_path, [{"instruction": "ask", "output": answer}])
    assert "\\u001b[31m\\u202exxx" in record
    assert "x … 3,006 characters … x" in record
    assert len(record) < 3000


def test_the_command_learns_its_source_from_the_stage_or_by_name(tmp_path):
    folder = source(tmp_path, [pair("a")])
    words = ["--out", "data/sources", "--metrics", "metrics/read_source"]

    def run(*more, **environment):
        return subprocess.run(
            [sys.executable, "-m", "stages.read_source", *words, *more],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run(DVC_STAGE="read_source@own")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (folder / "metrics/read_source/own.txt").read_text(encoding="utf-8")
    wrong = run("--name", "owm")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: params.yaml: section 'sources' has no entry 'owm'; did you mean 'own'?; known: own\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"a": "prompt", "b": "prompt"}}, "columns gives two columns the name 'prompt' twice"),
        ({"columns": {"a": "promt"}}, "the name 'promt', which no format reads; did you mean 'prompt'?"),
        ({"kinds": []}, "kinds must name at least one kind"),
        ({"kinds": ["sft", "sft"]}, "kinds names 'sft' twice"),
        ({"kinds": ["sfd"]}, "did you mean 'sft'?"),
        ({"format": "preferences"}, "did you mean 'preference'?"),
        ({"format": "alpaca", "kinds": ["preference"]}, "format alpaca has no rejected replies"),
        ({"format": "comparison"}, "format comparison needs the setting comparison"),
        ({"max_rows": 0}, "max_rows must be at least 1, found 0"),
        ({"path": "data/raw/link/../x"}, "path must not go up with .. from a folder that it names"),
        ({"path": "$(touch pwned)/../data"}, "path must not go up with .. from a folder that it names"),
        ({"ignore_columns": ["a", "a"]}, "ignore_columns names 'a' twice"),
        ({"ignore_columns": ["a"], "columns": {"a": "prompt"}}, "'a' is in columns and in ignore_columns: choose one"),
        ({"facts": ["a"]}, "facts ride on with prompts alone: serve prompts, or leave facts empty"),
        ({"facts": ["a"], "kinds": ["preference", "sft"]}, "facts ride on with prompts alone"),
        (
            {"ignore_columns": ["a"], "facts": ["a"], "kinds": ["prompts"]},
            "'a' is in facts and in ignore_columns: choose one",
        ),
        ({"weight": 1.0, "rows": 5}, "weight and rows each say how many train rows to draw: give one of them"),
        ({"split": "test", "weight": 1.0}, "weight and rows draw train rows"),
        ({"weight": 0.0}, "weight must be above 0"),
        ({"task": "film_reviews"}, "task is what grades responses to prompts"),
        ({"split": "eval"}, "split: 'eval' (str) is not one of: train, validation, test"),
        ({"delimiter": "|"}, "delimiter"),
    ],
)
def test_contradictory_settings_are_refused(changes, message):
    with pytest.raises(StageError) as caught:
        build(Sources, sources_of(files={"own": {"path": "raw", **changes}}), "params.yaml: sources")
    assert str(caught.value).startswith("params.yaml: sources.files.own")
    assert message in str(caught.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "a/b/c"}, "dataset must be owner/name, found a/b/c"),
        ({"revision": "main"}, "revision must be a full commit hash of 40 hexadecimal digits, found 'main'"),
        ({"revision": COMMIT[:-1]}, "revision must be a full commit hash of 40 hexadecimal digits"),
        ({"hub_split": "train[:10"}, "hub_split must be a split, or rows of one"),
        ({"hub_split": "train[:10%]", "streaming": True}, "with streaming a slice is of rows from the start"),
    ],
)
def test_hub_settings_that_name_nothing_certain_are_refused(changes, message):
    keys = {"dataset": "owner/name", "revision": COMMIT, **changes}
    with pytest.raises(StageError) as caught:
        build(Sources, sources_of(hub={"own": keys}), "params.yaml: sources")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "files, hub, tasks and arithmetic name no source"),
        ({"files": {"a": {}}, "tasks": {"a": {}}}, "two sources are named a, of files, hub, tasks and arithmetic"),
        ({"files": {"a b": {}}}, "a b"),
        ({"files": {"../a": {}}}, "../a"),
    ],
)
def test_names_of_sources_are_names(groups, message):
    with pytest.raises(StageError) as caught:
        build(Sources, sources_of(**groups), "params.yaml: sources")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("file", "keys", "expected"),
    [
        ("data/hh-rlhf", {"kinds": PAIRS}, {"rows_read": 2312, "rows_kept": 2299, "preference/rows": 2299}),
        ("data/demo/alpaca_en_demo.json", {}, {"rows_read": 999, "sft/rows": 999}),
        ("data/demo/dpo_en_demo.json", {"kinds": PAIRS}, {"rows_read": 300, "preference/rows": 300}),
        ("data/demo/kto_en_demo.json", {"kinds": ["unpaired"]}, {"rows_read": 300, "unpaired/rows": 300}),
        ("data/demo/glaive_toolcall_en_demo.json", {}, {"rows_read": 300, "sft/rows": 300}),
        ("data/gsm8k/test.jsonl", {"kinds": ["prompts"], "facts": ["answer"]}, {"prompts/rows": 1319}),
    ],
)
def test_real_files(tmp_path, file, keys, expected):
    rows, metrics, _ = read_rows(tmp_path, str(real_file(file).resolve()), **keys)
    assert {key: metrics[key] for key in expected} == expected
    assert len(rows) == sum(value for key, value in metrics.items() if key.endswith("/rows"))
