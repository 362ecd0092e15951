"""The tokenize stage as the pipeline runs it, on a tokenizer small enough to work ids out by hand."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow
import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash
from stages.lib.data import template_process
from stages.lib.data.prepared_rows import SPLITS
from stages.lib.data.prompts import Prompt, json_text, prompts_of
from stages.lib.data.token_tables import PREFERENCE_SCHEMA, PROMPT_SCHEMA, SFT_SCHEMA, read_note, read_table
from stages.lib.evaluation.evaluation_rows import prompts_of_texts
from stages.lib.models.tokenizer_files import tokenizer_hash
from stages.lib.runs.scratch import ScratchFolder
from stages.lib.settings.declaration import block
from stages.lib.settings.tokenize_data import Tokenize
from stages.tokenize_data import main
from tests.lib.data.test_chat import (
    ASSISTANT,
    EOS,
    HO,
    ID_H,
    ID_I,
    ID_O,
    MARKED,
    NEWLINE,
    SPACE,
    TINY_VOCABULARY,
    USER,
    assistant,
    tiny,
    user,
)
from tests.lib.data.test_token_rows import with_bos
from tests.loaded_python import loaded_python
from tests.real_files import PROJECT

SECTION = block(Tokenize, max_length=10, max_prompt_length=6)
CONFIG = {"model_type": "llama", "vocab_size": len(TINY_VOCABULARY), "max_position_embeddings": 12}
NO_SYSTEM_ROLE = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
SFT = {"messages": [user("hi"), assistant("ho")]}
PAIR = {"prompt": [user("hi")], "chosen": [assistant("ho")], "rejected": [assistant("o")]}
RATED = {"prompt": [user("hi")], "completion": [assistant("ho")], "label": True}
PROMPT = {"prompt": [user("hi")]}
GOOD = {"sft": SFT, "preference": PAIR, "unpaired": RATED, "prompts": PROMPT}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny(NO_SYSTEM_ROLE + MARKED).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def lines(rows):
    return "".join(json.dumps({**row, "source": "films"}) + "\n" for row in rows)


def arguments(folder, base, kind, train, held_out, changes):
    """Write rows (or the raw text of a file) and settings; the test split is one good row unless given."""
    held_out = [GOOD[kind]] if held_out is None else held_out
    for split, content in {"train": train, "validation": [GOOD[kind]], "test": held_out}.items():
        rows = folder / f"data/prepared/{split}/{kind}.jsonl"
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text(content if isinstance(content, str) else lines(content), encoding="utf-8")
    (folder / "params.yaml").write_text(json.dumps({"seed": 17, "tokenize_data": SECTION | changes}))
    (folder / "runtime.yaml").write_bytes((PROJECT / "runtime.yaml").read_bytes())
    return {
        "kind": kind,
        "prepared": "data/prepared",
        "tokenizer": str(base),
        "tokens": "data/tokens",
        "metrics": "metrics/tokenize_data",
    }


def tokenize(folder, base, kind, train, held_out=None, **changes):
    """Run the stage as a script; returns the finished process."""
    options = arguments(folder, base, kind, train, held_out, changes)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return subprocess.run(
        [*loaded_python(), "-m", "stages.tokenize_data", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )


def tokenize_here(folder, base, kind, train, held_out=None, **changes):
    """The same in this process, without the seconds that a script takes to start. Returns the metrics."""
    options = arguments(folder, base, kind, train, held_out, changes)
    paths = {name: Path(value) for name, value in options.items() if name != "kind"}
    with contextlib.chdir(folder):
        main(kind=kind, **paths)
    return json.loads((folder / options["metrics"] / f"{kind}.json").read_text())


def refusal(folder, base, kind, train, held_out=None, **changes):
    """The message with which the stage refuses its input, having written nothing."""
    with pytest.raises(StageError) as refused:
        tokenize_here(folder, base, kind, train, held_out, **changes)
    assert_nothing_written(folder)
    return str(refused.value)


def assert_nothing_written(folder):
    written = [path for path in (folder / "data/tokens", folder / "metrics") if path.exists()]
    assert [file for path in written for file in path.rglob("*") if file.is_file()] == []


def metrics_of(process, folder, kind):
    assert process.returncode == 0, process.stderr
    return json.loads((folder / f"metrics/tokenize_data/{kind}.json").read_text())


def test_sft_by_hand(tmp_path, base):
    rows = [
        SFT,
        {"messages": [user("h<eos>"), assistant("o")]},
        {"messages": [user("h"), assistant("z")]},
        {"messages": [user("h"), assistant("i"), user("o"), assistant(" o\n")]},
        {"messages": [user("hihihih"), assistant("o")]},
        {"messages": [user("h"), assistant("o" * 9)]},
    ]
    process = tokenize(tmp_path, base, "sft", rows, truncation="drop", max_length=12, max_prompt_length=8)
    assert metrics_of(process, tmp_path, "sft") == {
        "train_rows": 2,
        "validation_rows": 1,
        "test_rows": 1,
        "train_tokens": 6 + 12,
        "validation_tokens": 6,
        "test_tokens": 6,
        "max_prompt_tokens": 4,
        "mean_prompt_tokens": 3.75,
        "max_reply_tokens": 9,
        "mean_reply_tokens": 3.75,
        "max_tokens": 12,
        "share_trained": round(12 / 30, 6),
        "cut/prompts": 0,
        "cut/replies": 0,
        "reasoning_left_out": 0,
        "dropped/not_reversible": 1,
        "dropped/prompt_too_long": 1,
        "dropped/special_token_in_text": 1,
        "dropped/too_long": 1,
    }
    two_turns = [USER, ID_H, ASSISTANT, ID_I, EOS, USER, ID_O, ASSISTANT, SPACE, ID_O, NEWLINE, EOS]
    assert list(read_table(tmp_path / "data/tokens/train/sft.arrow", SFT_SCHEMA)) == [
        {
            "row": 0,
            "input_ids": [USER, ID_H, ID_I, ASSISTANT, HO, EOS],
            "loss_mask": [False] * 4 + [True] * 2,
            "messages": json_text([user("hi")]),
            "context": "{}",
            "source": "films",
        },
        {
            "row": 3,
            "input_ids": two_turns,
            "loss_mask": [False] * 3 + [True] * 2 + [False] * 3 + [True] * 4,
            "messages": json_text([user("h")]),
            "context": "{}",
            "source": "films",
        },
    ]


def test_preference_by_hand(tmp_path, base):
    rows = [PAIR, {**PAIR, "chosen": [assistant("<u>")]}, {**PAIR, "margin": 0.5}]
    metrics = tokenize_here(tmp_path, base, "preference", rows)
    ids = {"prompt_ids": [USER, ID_H, ID_I, ASSISTANT], "chosen_ids": [HO, EOS], "rejected_ids": [ID_O, EOS]}
    table = read_table(tmp_path / "data/tokens/train/preference.arrow", PREFERENCE_SCHEMA)
    ids["source"] = "films"
    assert list(table) == [{"row": 0, **ids, "margin": None}, {"row": 2, **ids, "margin": 0.5}]
    assert metrics["train_tokens"] == 16
    assert metrics["max_tokens"] == 6
    assert metrics["dropped/special_token_in_text"] == 1


def test_prompts_by_hand_and_the_same_bytes_twice(tmp_path, base):
    turns = [user("h"), assistant("i"), user("o")]
    rows = [{**PROMPT, "facts": {"b": "é", "a": [1.5]}, "id": 7}, {"prompt": turns}] * 600
    metrics = [
        metrics_of(tokenize(tmp_path / run, base, "prompts", rows, max_prompt_length=8), tmp_path / run, "prompts")
        for run in ("one", "two")
    ]
    table = read_table(tmp_path / "one/data/tokens/train/prompts.arrow", PROMPT_SCHEMA)
    assert table[1198]["messages"] == '[{"content": "hi", "role": "user"}]'
    assert table[1198]["facts"] == '{"a": [1.5], "b": "é"}'
    ids = [USER, ID_H, ASSISTANT, ID_I, EOS, USER, ID_O, ASSISTANT]
    assert prompts_of(table[1199:]) == [Prompt(1199, ids, turns, {}, {}, "films")]
    assert metrics[0] == metrics[1]
    assert metrics[0]["train_tokens"] == 600 * (4 + 8)
    assert dvc_hash(tmp_path / "one/data/tokens") == dvc_hash(tmp_path / "two/data/tokens")


def test_no_validation_prompts_are_an_empty_table(tmp_path, base):
    options = arguments(tmp_path, base, "prompts", [PROMPT], None, {})
    (tmp_path / "data/prepared/validation/prompts.jsonl").write_text("")
    with contextlib.chdir(tmp_path):
        main(kind="prompts", **{name: Path(value) for name, value in options.items() if name != "kind"})
    for split, rows in {"train": 1, "validation": 0, "test": 1}.items():
        with pyarrow.ipc.open_stream(tmp_path / f"data/tokens/{split}/prompts.arrow") as table:
            assert table.read_all().num_rows == rows


def test_a_refusal_is_one_message_and_exit_code_2(tmp_path, base):
    process = tokenize(tmp_path, base, "prompts", [PROMPT, {"prompt": [user("hihih")]}])
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "error: data/prepared/train/prompts.jsonl, line 2: prompt has 7 tokens, budget is 6; "
        "raise tokenize_data.max_prompt_length or set tokenize_data.truncation: drop, keep_end or keep_start"
    ]
    assert_nothing_written(tmp_path)


def test_a_reply_over_the_budget(tmp_path, base):
    rows = [PAIR, {**PAIR, "rejected": [assistant("o" * 6)]}]
    assert refusal(tmp_path, base, "preference", [PAIR], rows) == (
        "data/prepared/test/preference.jsonl, line 2: prompt and reply have 11 tokens, budget is 10; "
        "raise tokenize_data.max_length or set tokenize_data.truncation: drop, keep_end or keep_start"
    )


@pytest.mark.parametrize(
    ("kind", "train", "message"),
    [
        ("sft", "", "train/sft.jsonl is empty"),
        ("sft", lines([SFT]) + "{no", "train/sft.jsonl, line 2: not valid JSON"),
        (
            "sft",
            [SFT, PAIR],
            "train/sft.jsonl, line 2: 'messages' is missing (the row has prompt, chosen, rejected, source)",
        ),
        ("sft", [{"messages": [user("h")]}], "train/sft.jsonl, line 1: 'messages' must hold a prompt and end with"),
        ("sft", [{"messages": [user("h"), assistant(" ")]}], "train/sft.jsonl, line 1: the reply is empty"),
        ("preference", [PAIR, {**PAIR, "chosen": []}], "line 2: 'chosen' must hold exactly one message"),
        (
            "preference",
            [{**PAIR, "margin": "big"}],
            "line 1, 'margin': expected a finite number of at least 0 that float32 holds, found 'big'",
        ),
        (
            "preference",
            [{**PAIR, "rejected": [assistant(7)]}],
            "line 1, 'rejected', message 1, 'content': expected text",
        ),
        ("prompts", [{"prompt": [assistant("h")]}], "line 1: 'prompt' must hold messages and not end with"),
        (
            "prompts",
            [PROMPT, {**PROMPT, "facts": [1]}],
            "train/prompts.jsonl, line 2, 'facts': expected an object, found list",
        ),
        (
            "prompts",
            [{**PROMPT, "facts": None}],
            "train/prompts.jsonl, line 1, 'facts': expected an object, found NoneType",
        ),
        ("prompts", lines([PROMPT])[:-2] + ', "facts": {"a": 1e999}}', "line 1, 'facts': a number is larger than any"),
        ("prompts", [{**PROMPT, "facts": {"a": "\ud800"}}], "line 1, 'facts': a text holds half a surrogate pair"),
        ("prompts", [{"prompt": [user("<u>")]}], "train/prompts.jsonl: no row is left (1 special_token_in_text)"),
    ],
)
def test_a_bad_row_is_named(tmp_path, base, kind, train, message):
    assert message in refusal(tmp_path, base, kind, train)


def test_what_the_template_refuses_is_named_with_its_row(tmp_path, base):
    message = refusal(tmp_path, base, "prompts", [PROMPT, {"prompt": [{"role": "system", "content": "h"}]}])
    place = "data/prepared/train/prompts.jsonl, line 2"
    assert message == (
        f"{place}: the chat template refuses these messages: no system role; mend the row or the chat "
        "template, or set tokenize_data.on_unusable_row: drop"
    )


@pytest.mark.parametrize(
    ("config", "section", "message"),
    [
        ({"max_position_embeddings": 9}, {}, "tokenize_data.max_length is 10, but the model of {base} has 9 positions"),
        (
            {"vocab_size": 10},
            {},
            "validation/preference.jsonl, row 0, chosen_ids: token id 10 is outside the vocabulary of 10",
        ),
        ({}, {"max_prompt_length": 10}, "params.yaml: tokenize_data: max_prompt_length (10) must be below"),
        (
            {},
            {"truncation": "cut"},
            "tokenize_data.truncation: 'cut' (str) is not one of: error, drop, keep_end, keep_start",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, config, section, message):
    base = tmp_path / "base"
    tiny().save_pretrained(base)
    (base / "config.json").write_text(json.dumps(CONFIG | config))
    no_ho = {**PAIR, "chosen": [assistant("i")]}
    assert message.format(base=base) in refusal(tmp_path, base, "preference", [no_ho], [PAIR], **section)


def test_outs_of_an_earlier_run_stay_when_a_run_fails(tmp_path, base):
    tokenize_here(tmp_path, base, "prompts", [PROMPT])
    before = dvc_hash(tmp_path / "data/tokens"), dvc_hash(tmp_path / "metrics")
    with pytest.raises(StageError):
        tokenize_here(tmp_path, base, "prompts", [PROMPT, {}])
    assert (dvc_hash(tmp_path / "data/tokens"), dvc_hash(tmp_path / "metrics")) == before


STRIPS = MARKED.replace("~ m['content']", "~ m['content'] | trim")
DIVIDES = "<u>{% set _ = 1 / (messages[0]['content'] != 'o') %}{{ messages[0]['content'] }}"
CUTS_THOUGHTS = (
    "{% for m in messages %}<u>{{ m['content'].split('i')[-1] if m['role'] == 'assistant' else m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<u>{% endif %}"
)
ASKS = MARKED + "{% if add_generation_prompt and messages[0]['content'] == 'o' %}o{% endif %}"  # nothing goes on so
LOOPS = (
    "{% if messages[0]['content'] == 'o' %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}"
)


def base_with(folder, template):
    tiny(template).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize(
    ("template", "row", "reason", "message"),
    [
        (NO_SYSTEM_ROLE + MARKED, {"role": "system", "content": "h"}, "template_refuses", "refuses these messages: no"),
        (DIVIDES, user("o"), "template_refuses", "ZeroDivisionError"),
        (
            "{{ messages[0]['content'] if messages[0]['content'] != 'o' }}",
            user("o"),
            "template_refuses",
            "gives no text for these",
        ),
    ],
)
def test_a_prompt_that_the_template_refuses(tmp_path, template, row, reason, message):
    base = base_with(tmp_path / "base", template)
    rows = [PROMPT, {"prompt": [row, *([user("h")] if row["role"] == "system" else [])]}, PROMPT]
    refused = refusal(tmp_path, base, "prompts", rows)
    assert refused.startswith("data/prepared/train/prompts.jsonl, line 2: the chat template ")
    assert message in refused
    assert refused.endswith(", or set tokenize_data.on_unusable_row: drop")
    metrics = tokenize_here(tmp_path, base, "prompts", rows, on_unusable_row="drop")
    assert (metrics["train_rows"], metrics[f"dropped/{reason}"]) == (2, 1)
    assert read_table(tmp_path / "data/tokens/train/prompts.arrow", PROMPT_SCHEMA)["row"][:] == [0, 2]


@pytest.mark.parametrize(
    ("template", "reply", "reason", "message"),
    [
        (CUTS_THOUGHTS, "oiho", "reply_changed", "leaves out a reply or changes it: 'oiho' gives 'ho'"),
        (ASKS, "ho", "prompt_not_a_beginning", "does not render a prompt as a beginning"),
    ],
)
def test_a_reply_that_the_template_changes(tmp_path, template, reply, reason, message):
    base = base_with(tmp_path / "base", template)
    rows = [SFT, {"messages": [user("o"), assistant(reply)]}]
    refused = refusal(tmp_path, base, "sft", rows)
    assert refused.startswith("data/prepared/train/sft.jsonl, line 2: the chat template ")
    assert message in refused
    metrics = tokenize_here(tmp_path, base, "sft", rows, on_unusable_row="drop")
    assert (metrics["train_rows"], metrics[f"dropped/{reason}"]) == (1, 1)


def test_a_prompt_with_half_a_character_in_what_the_template_leaves_out(tmp_path):
    base = base_with(tmp_path / "base", CUTS_THOUGHTS)
    thought = [user("o"), assistant("\ud800io"), user("h")]
    metrics = tokenize_here(tmp_path, base, "prompts", [PROMPT, {"prompt": thought}], max_prompt_length=9)
    assert (metrics["train_rows"], metrics["dropped/invalid_unicode"]) == (1, 1)


def test_a_pair_that_the_template_makes_identical_is_dropped(tmp_path):
    base = base_with(tmp_path / "base", STRIPS)
    rows = [PAIR, {**PAIR, "chosen": [assistant("ho")], "rejected": [assistant("ho\n")]}]
    metrics = tokenize_here(tmp_path, base, "preference", rows)
    assert (metrics["train_rows"], metrics["dropped/equal_replies"]) == (1, 1)


def test_a_template_without_end_names_the_row_whatever_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    template_process._process_of.cache_clear()
    base = base_with(tmp_path / "base", LOOPS + MARKED)
    refused = refusal(tmp_path, base, "prompts", [PROMPT, PROMPT, {"prompt": [user("o")]}], on_unusable_row="drop")
    place = "data/prepared/train/prompts.jsonl, line 3"
    assert refused == f"{place}: the chat template was stopped: rendering these messages took more than 0.5 s"


def test_faults_are_named_in_the_order_of_rows(tmp_path, base):
    rows = [PROMPT, {"prompt": [user("hihihihih")]}, {}]
    assert "line 2: prompt has" in refusal(tmp_path, base, "prompts", rows)
    assert "line 3: 'prompt' is missing" in refusal(tmp_path, base, "prompts", rows, truncation="drop")


def test_a_table_names_its_tokenizer(tmp_path, base):
    tokenize_here(tmp_path, base, "prompts", [PROMPT])
    for split in SPLITS:
        assert read_note(tmp_path / f"data/tokens/{split}/prompts.arrow", "tokenizer") == tokenizer_hash(base)


IN_SMALL_SHARDS = """
from stages.lib.command.run import run
from stages.lib.data import token_shards
from stages.tokenize_data import main
token_shards.SHARD_ROWS, token_shards.ROWS_WORTH_A_WORKER = 20, 20
run(main)
"""


def start_in_small_shards(folder, options):
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "STAGEWISE_SCRATCH": str(folder / ".scratch")}
    command = [*loaded_python(), "-c", IN_SMALL_SHARDS, *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def kept_shards(folder):
    return [path for path in folder.glob(".scratch/*/kept/*") if path.suffix != ".partial"]


def test_killed_and_resumed_equals_never_killed(tmp_path, base):
    rows = [{**PAIR, "rejected": [assistant("o" * (1 + number % 3))]} for number in range(4000)]
    results = {}
    for name, workers, kills in (("never", 1, 0), ("twice", 2, 2)):
        folder = tmp_path / name
        folder.mkdir()
        options = arguments(folder, base, "preference", rows, None, {})
        runtime = (folder / "runtime.yaml").read_text()
        (folder / "runtime.yaml").write_text(f"{runtime}\ntokenize_data: {{workers: {workers}}}\n")
        for kill in range(kills):
            process = start_in_small_shards(folder, options)
            while len(kept_shards(folder)) < 20 * (kill + 1) and process.poll() is None:
                time.sleep(0.01)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            assert not (folder / "data/tokens/train/preference.arrow").exists()
        process = start_in_small_shards(folder, options)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert ("resuming, goes on from what an earlier start has kept" in said) == (kills > 0)
        assert kept_shards(folder) == []
        results[name] = dvc_hash(folder / "data/tokens"), dvc_hash(folder / "metrics")
    assert results["never"] == results["twice"]


def test_a_damaged_shard_is_made_again(tmp_path, base, monkeypatch):
    kept = {}
    monkeypatch.setattr(ScratchFolder, "keep", lambda _, name, content: kept.__setitem__(name, content))
    metrics = tokenize_here(tmp_path / "one", base, "prompts", [PROMPT, PROMPT])
    monkeypatch.undo()
    with contextlib.chdir(tmp_path / "one"):
        shutil.rmtree("data/tokens")
        (scratch,) = Path(".scratch").glob("tokenize_data-*")
        (scratch / "complete.json").unlink()
        (scratch / "kept").mkdir()
        for name, content in kept.items():
            (scratch / "kept" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert tokenize_here(tmp_path / "one", base, "prompts", [PROMPT, PROMPT]) == metrics


def test_what_is_said_of_reasoning_and_cut_rows(tmp_path, base, capsys):
    thought = {"messages": [user("h"), {**assistant("o"), "thinking": "hi"}]}
    long = {"messages": [user("hihihih"), assistant("o")]}
    metrics = tokenize_here(tmp_path, base, "sft", [thought, thought, long, SFT], truncation="keep_start")
    said = capsys.readouterr().out
    assert "0 rows dropped, 1 cut\n" in said
    assert f"note: in 2 rows of sft the chat template of {base} leaves out reasoning that a message has" in said
    assert (metrics["reasoning_left_out"], metrics["cut/prompts"], metrics["cut/replies"]) == (2, 1, 0)


def test_first_tokens_of_texts(tmp_path, base, capsys):
    rows = [{"text": "h" * 9}] * 30
    tokenize_here(tmp_path, base, "prompts", rows, [{"text": "hi"}], text_prompt_tokens=[2, 4])
    table = read_table(tmp_path / "data/tokens/train/prompts.arrow", PROMPT_SCHEMA)
    assert {len(ids) for ids in table["prompt_ids"]} == {2, 3, 4}
    for prompt in prompts_of(table[:]):  # whoever does not read the ids sees what they hold
        assert prompt.shown == "h" * len(prompt.ids)
        assert prompt.context["cut"]
    assert "text_prompt_tokens" not in capsys.readouterr().err
    tokenize_here(tmp_path / "none", base, "prompts", [PROMPT], text_prompt_tokens=[2, 4])
    warning = "warning: no prompt is plain text, so none is cut as tokenize_data.text_prompt_tokens says\n"
    assert capsys.readouterr().err == warning
    refused = refusal(tmp_path / "other", base, "prompts", rows, text_prompt_tokens=[4, 2])
    assert "text_prompt_tokens must be [least, most], found [4, 2]" in refused


def test_bos_before_a_text_is_not_shown_of_it(tmp_path):
    tokenizer = with_bos()
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base/config.json").write_text(json.dumps(CONFIG))
    tokenize_here(tmp_path, tmp_path / "base", "prompts", [{"text": "hio"}], text_prompt_tokens=[2, 2])
    (prompt,) = prompts_of(read_table(tmp_path / "data/tokens/train/prompts.arrow", PROMPT_SCHEMA)[:])
    assert (prompt.ids, prompt.shown) == ([USER, ID_H, ID_I], "hi")


@pytest.mark.parametrize(("truncation", "shown"), [("keep_end", "hihih<a>"), ("keep_start", "<u>ihihi")])
def test_a_cut_prompt_is_shown_as_far_as_its_ids_go(tmp_path, base, truncation, shown):
    turns = [user("ihihihih")]
    tokenize_here(tmp_path, base, "prompts", [{"prompt": turns}, PROMPT], truncation=truncation)
    cut, whole = prompts_of(read_table(tmp_path / "data/tokens/train/prompts.arrow", PROMPT_SCHEMA)[:])
    assert (cut.shown, cut.context["cut"], cut.messages) == (shown, True, turns)
    assert (whole.shown, whole.context) == ([user("hi")], {})


def test_prompts_of_texts_are_shown_as_messages(tmp_path, base):
    """So a reward model renders them with a chat template of its own, and not with the policy's in them."""
    earlier = [user("h"), {**assistant("i"), "weight": 0}, user("o")]
    rows = [
        SFT,
        {"messages": [*earlier, assistant("o")]},
        {"text": "hihi"},
        {"messages": [user("ihihihi"), assistant("o")]},
    ]
    tokenize_here(tmp_path, base, "sft", rows, max_length=12, truncation="keep_end", max_prompt_length=8)
    prompts = prompts_of_texts(read_table(tmp_path / "data/tokens/train/sft.arrow", SFT_SCHEMA), None)
    shown = [[user("hi")], [user("h"), assistant("i"), user("o")], "ihihihi<a>"]
    assert [(prompt.row, prompt.shown) for prompt in prompts] == [*zip((0, 1, 3), shown, strict=True)]
    assert [len(prompt.ids) for prompt in prompts] == [4, 8, 8]


@pytest.mark.parametrize("margin", [1e39, float("inf"), float("nan"), True, 10**400, -1])
def test_a_margin_that_no_float32_holds(tmp_path, base, margin):
    with pytest.raises(
        StageError,
        match=r"line 1(, 'margin': expected a finite number of at least 0 that float32 holds, found|: not usable JSON)",
    ):
        tokenize_here(tmp_path, base, "preference", [{**PAIR, "margin": margin}])
