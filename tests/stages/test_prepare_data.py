"""All sources in splits: every row is written or counted, no prompt is in two splits, mixtures are as asked for."""

import gzip
import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import combinations

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.data.prepared_rows import SPLITS
from stages.lib.settings.declaration import block
from stages.lib.settings.prepare_data import PrepareData
from stages.lib.settings.source_agreement import may_have_margins, require_served
from stages.lib.settings.sources import Sources
from tests.real_files import PROJECT, real_file
from tests.stages.data_stages import (
    HALF,
    all_rows,
    bytes_below,
    prepare,
    read,
    read_and_prepare,
    settings,
    sources_of,
    write_rows,
)
from tests.stages.test_read_source import PAIRS, conversation, pair


def one_source(folder, rows, **keys):
    return sources_of(files={"own": {"path": write_rows(folder / "raw.jsonl", rows), "kinds": PAIRS, **keys}})


def test_every_row_is_written_with_its_source_or_counted_by_reason(tmp_path):
    rows = [
        *(pair(f"ask {number}") for number in range(8)),
        pair("ask 0"),  # the same once more
        pair("ask 1", rejected="never"),  # another pair with the same prompt and chosen reply
        pair("ask 2", chosen="surely") | {"margin": 1.5},
    ]
    rows_of, metrics = read_and_prepare(tmp_path, one_source(tmp_path, rows), **HALF)
    totals = {kind: len(all_rows(rows_of, kind)) for kind in PAIRS}
    assert totals == {"sft": 9, "preference": 10, "prompts": 8}
    assert {key: count for key, count in metrics.items() if "dropped" in key} == {
        "own/sft/dropped/duplicate": 2,
        "own/preference/dropped/duplicate": 1,
        "own/prompts/dropped/duplicate": 3,
    }
    for kind in PAIRS:
        for split in SPLITS:
            count = len(rows_of[f"{split}/{kind}"])
            assert metrics[f"{kind}/{split}_rows"] == metrics[f"own/{kind}/{split}_rows"] == count
    assert len(rows_of["test/prompts"]) == len(rows_of["validation/prompts"]) == 2
    with_margin = [row for row in all_rows(rows_of, "preference") if "margin" in row]
    assert with_margin == [
        {
            "prompt": [{"role": "user", "content": "ask 2"}],
            "chosen": [{"role": "assistant", "content": "surely"}],
            "rejected": [{"role": "assistant", "content": "no"}],
            "margin": 1.5,
            "source": "own",
        }
    ]
    assert {"messages": conversation("ask 3", "yes"), "source": "own"} in all_rows(rows_of, "sft")


def test_no_prompt_is_in_two_splits_in_any_kind(tmp_path):
    spellings = ("what is {}?", "What is {}?", " what  is\n{}? ")
    rows = [pair(form.format(number), rejected=form) for number in range(30) for form in spellings]
    rows_of, _ = read_and_prepare(tmp_path, one_source(tmp_path, rows), validation_fraction=0.1, test_fraction=0.25)

    def questions(split):
        texts = [
            row.get("prompt", row.get("messages"))[0]["content"] for kind in PAIRS for row in rows_of[f"{split}/{kind}"]
        ]
        return {"".join(filter(str.isdigit, text)) for text in texts}

    assert set.union(*map(questions, SPLITS)) == {str(number) for number in range(30)}
    assert all(not questions(one) & questions(other) for one, other in combinations(SPLITS, 2))
    assert len(questions("test")) == 8  # a quarter of 30, rounded to even
    assert len(questions("validation")) == 3
    assert len(rows_of["test/preference"]) == 24


def test_a_second_run_writes_the_same_bytes_and_another_seed_other_splits(tmp_path):
    sources = one_source(tmp_path, [pair(f"ask {number}") for number in range(40)])
    runs = {"first": 17, "second": 17, "other": 18}
    for name, seed in runs.items():
        read_and_prepare(tmp_path / name, sources, seed=seed)
    first, second, other = (bytes_below(tmp_path / name / "data") for name in runs)
    assert first == second
    assert first != other
    prepare(tmp_path / "first")
    assert bytes_below(tmp_path / "first/data") == first


def test_kinds_that_are_not_wanted_have_no_files(tmp_path):
    sources = one_source(tmp_path, [pair(f"ask {number}") for number in range(8)])
    rows_of, metrics = read_and_prepare(tmp_path, sources, kinds=["prompts"])
    assert set(rows_of) == {f"{split}/prompts" for split in SPLITS}
    assert not [key for key in metrics if "sft" in key or "preference" in key]


def test_conversations_that_go_on_from_one_another_stand_on_one_side(tmp_path):
    talks = [[f"ask {n}", "yes", f"more {n}", "no", "end", "good"][:length] for n in range(12) for length in (2, 4, 6)]
    talks[0][0], talks[1][0] = "ＡＳＫ  0", "ask\u00a00"
    sources = one_source(tmp_path, [{"messages": conversation(*talk)} for talk in talks], kinds=["sft", "prompts"])
    rows_of, metrics = read_and_prepare(tmp_path, sources, kinds=["sft", "prompts"], **HALF)
    assert metrics["sft/test_rows"] == metrics["prompts/test_rows"] == 9  # a quarter, in whole groups of three
    numbers = {
        split: {
            unicodedata.normalize("NFKC", row["messages"][0]["content"]).split()[1] for row in rows_of[f"{split}/sft"]
        }
        for split in SPLITS
    }
    assert [len(numbers[split]) for split in SPLITS] == [6, 3, 3]
    assert len(set.union(*numbers.values())) == 12


def several(folder):
    """A source of train rows, one of test rows that share two prompts with it, and one without a split."""
    train = write_rows(folder / "train.jsonl", [pair(f"ask {n}") for n in range(10)])
    test = write_rows(folder / "test.jsonl", [{"prompt": f"Ask {n}"} for n in (3, 4, 100)])
    free = write_rows(folder / "free.jsonl", [pair(f"ask {n}") for n in (3, 9, *range(20, 40))])
    return sources_of(
        files={
            "train": {"path": train, "kinds": PAIRS, "split": "train"},
            "test": {"path": test, "kinds": ["prompts"], "format": "prompt", "split": "test"},
            "free": {"path": free, "kinds": ["sft", "preference", "prompts"]},
        }
    )


def test_leaks_and_duplicates_are_counted_by_source(tmp_path):
    rows_of, metrics = read_and_prepare(tmp_path, several(tmp_path), **HALF)
    assert {key: count for key, count in metrics.items() if "dropped" in key} == {
        **{f"train/{kind}/dropped/in_test": 2 for kind in PAIRS},
        **{f"free/{kind}/dropped/in_test": 1 for kind in PAIRS},  # ask 3
        **{f"free/{kind}/dropped/duplicate": 1 for kind in PAIRS},  # ask 9, which the first source has in train
    }
    assert metrics["test/prompts/test_rows"] == 3
    assert metrics["train/sft/train_rows"] == 8
    assert Counter(row["source"] for row in rows_of["test/prompts"]) == {"test": 3, "free": 5}
    contents = {row["messages"][0]["content"] for row in rows_of["train/sft"]}
    assert not {"ask 3", "ask 4"} & contents


def test_more_test_rows_leave_the_bytes_of_train_and_validation_alone(tmp_path):
    sources = several(tmp_path)
    read_and_prepare(tmp_path, sources, **HALF)
    before = {split: bytes_below(tmp_path / f"data/prepared/{split}") for split in SPLITS}
    write_rows(tmp_path / "test.jsonl", [{"prompt": f"Ask {n}"} for n in (3, 4, 101, 102)])
    read(tmp_path, "test")
    prepare(tmp_path)
    after = {split: bytes_below(tmp_path / f"data/prepared/{split}") for split in SPLITS}
    assert {split for split in SPLITS if after[split] != before[split]} == {"test"}


def test_sources_are_mixed_by_weight_for_each_kind_and_by_number(tmp_path):
    files = {
        name: {"path": write_rows(tmp_path / f"{name}.jsonl", [pair(f"{name} {n}") for n in range(count)])} | keys
        for name, count, keys in (
            ("large", 100, {"kinds": ["sft", "prompts"], "weight": 1.0}),
            ("small", 40, {"kinds": ["sft"], "weight": 2.0}),
            ("some", 100, {"kinds": ["sft"], "rows": 7}),
        )
    }
    kinds = ["sft", "prompts"]
    rows_of, metrics = read_and_prepare(tmp_path, sources_of(files=files), kinds=kinds, **HALF)
    train = Counter(row["source"] for row in rows_of["train/sft"])
    assert train["small"] == metrics["small/sft/train_rows"] > 0
    assert "small/sft/dropped/not_drawn" not in metrics
    assert train["large"] == train["small"] // 2
    assert train["some"] == 7
    assert "large/prompts/dropped/not_drawn" not in metrics  # the only source of that kind: all of it
    held_out = [metrics[f"{name}/sft/{split}_rows"] for name in files for split in ("validation", "test")]
    assert sum(held_out) == 120  # of 240, whatever is drawn of train
    again, _ = read_and_prepare(tmp_path / "again", sources_of(files=files), kinds=kinds, **HALF)
    assert again == rows_of


def test_rows_that_are_asked_for_and_not_there_are_told(tmp_path, capsys):
    rows = [{"prompt": f"Ask {n}", "completion": "yes"} for n in range(40)]
    own = {"path": write_rows(tmp_path / "raw.jsonl", rows), "kinds": ["sft", "prompts"], "rows": 5000}
    _, metrics = read_and_prepare(tmp_path, sources_of(files={"own": own}), kinds=["sft"], **HALF)
    assert (metrics["own/sft/train_rows"], metrics["own/sft/train_rows_lacking"]) == (20, 4980)
    assert "own/prompts/train_rows_lacking" not in metrics
    assert capsys.readouterr().err == (
        "warning: sources.files.own.rows: 5000 train rows of kind sft are asked for, and 20 are there; all of them are "
        "taken\n"
    )
    own["rows"] = 20
    _, metrics = read_and_prepare(tmp_path, sources_of(files={"own": own}), kinds=["sft"], **HALF)
    assert "own/sft/train_rows_lacking" not in metrics
    assert capsys.readouterr().err == ""


def test_rows_of_a_source_that_is_no_longer_named_are_removed(tmp_path, capsys):
    read_and_prepare(tmp_path, several(tmp_path), **HALF)
    sources = several(tmp_path)
    del sources["files"]["free"]
    sources["files"]["train"]["split"] = None
    settings(tmp_path, sources, kinds=["prompts"], validation_fraction=0.25, test_fraction=0.0)
    read(tmp_path, "train")
    rows_of, _ = prepare(tmp_path)
    assert "data/sources/free is removed: params.yaml names no such source" in capsys.readouterr().out
    assert not (tmp_path / "data/sources/free").exists()
    assert {row["source"] for row in all_rows(rows_of, "prompts")} == {"train", "test"}


@pytest.mark.parametrize(
    ("keys", "changes", "message"),
    [
        ({}, {"test_fraction": 0.0}, "no row of kind sft is in the split test; raise prepare_data.test_fraction, or"),
        ({"split": "train"}, {}, "no row of kind sft is in the split validation"),
        ({"split": "test"}, {}, "no row of kind sft is in the split train; give a source of that kind with split"),
    ],
)
def test_a_split_without_rows_of_a_kind_is_told(tmp_path, keys, changes, message):
    sources = one_source(tmp_path, [pair(f"ask {number}") for number in range(8)], **keys)
    with pytest.raises(StageError) as caught:
        read_and_prepare(tmp_path, sources, **changes)
    assert message in str(caught.value)
    assert not list((tmp_path / "data/prepared").iterdir())
    assert not (tmp_path / "metrics/prepare_data.json").exists()


def test_what_was_there_stays_when_a_run_fails(tmp_path):
    read_and_prepare(tmp_path, one_source(tmp_path, [pair(f"ask {number}") for number in range(8)]))
    before = bytes_below(tmp_path / "data/prepared")
    (tmp_path / "data/sources/own/rows.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(StageError, match=r"data/sources/own/rows.jsonl, line 1: not valid JSON"):
        prepare(tmp_path)
    assert bytes_below(tmp_path / "data/prepared") == before


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"messages": []}, "own/rows.jsonl, row 1: not what"),
        ({"kind": "sft", "messages": [], "split": "eval"}, "own/rows.jsonl, row 1: not what"),
        ({"kind": "sft"}, "own/rows.jsonl: a row of kind sft is not what"),
        ({"kind": "sft", "messages": 5}, "own/rows.jsonl: a row of kind sft is not what"),
    ],
)
def test_a_row_that_read_source_does_not_write_is_refused(tmp_path, row, where):
    read_and_prepare(tmp_path, one_source(tmp_path, [pair(f"ask {number}") for number in range(8)]))
    (tmp_path / "data/sources/own/rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(StageError, match=rf"data/sources/{where} read_source writes; run read_source@own again$"):
        prepare(tmp_path)


def test_a_link_among_the_sources_is_removed_and_not_what_it_leads_to(tmp_path):
    sources = one_source(tmp_path, [pair(f"ask {number}") for number in range(8)])
    read_and_prepare(tmp_path, sources)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/rows.jsonl").write_text("{}", encoding="utf-8")
    (tmp_path / "data/sources/old").symlink_to(tmp_path / "elsewhere")
    prepare(tmp_path)
    assert not (tmp_path / "data/sources/old").is_symlink()
    assert (tmp_path / "elsewhere/rows.jsonl").is_file()


def test_a_mistake_is_one_line_of_the_command(tmp_path):
    settings(tmp_path, one_source(tmp_path, [pair("ask")]))
    read(tmp_path, "own")
    words = ["--sources", "data/sources", "--out", "data/prepared", "--metrics", "metrics/prepare_data.json"]
    done = subprocess.run(
        [sys.executable, "-m", "stages.prepare_data", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 distinct prompt in 1 group cannot be divided among train and test and ")
    assert len(done.stderr.splitlines()) == 1


NEAR = {"similarity": 0.8, "words": 3, "permutations": 128}


def test_near_duplicates_are_left_out_of_train_if_asked(tmp_path):
    words = [f"w{n}" for n in range(60)]
    rows = [{"instruction": " ".join(words), "output": "yes"}]
    rows.append({"instruction": " ".join([*words[:59], "end"]), "output": "yes"})  # 57 runs of 3 of 63 are shared
    rows += [{"instruction": " ".join(reversed(words)), "output": "yes"}]
    train = write_rows(tmp_path / "train.jsonl", rows)
    other = write_rows(
        tmp_path / "other.jsonl", [{"instruction": f"a {n} b {n} c {n}", "output": "x"} for n in range(8)]
    )
    sources = sources_of(
        files={"train": {"path": train, "split": "train"}, "other": {"path": other}},
    )
    kept, _ = read_and_prepare(tmp_path, sources, kinds=["sft"], **HALF)
    left, metrics = read_and_prepare(tmp_path, sources, kinds=["sft"], near_duplicates=NEAR, **HALF)
    assert metrics["train/sft/dropped/near_duplicate"] == 1
    assert [row for row in kept["train/sft"] if row not in left["train/sft"]] == [kept["train/sft"][1]]
    assert [left[f"{split}/sft"] for split in ("validation", "test")] == [
        kept[f"{split}/sft"] for split in ("validation", "test")
    ]


def test_train_rows_that_hold_test_prompts_are_left_out_if_asked(tmp_path):
    asked = "how many legs do four spiders have if one of them lost two"
    test = write_rows(
        tmp_path / "test.jsonl", [{"prompt": asked, "completion": "30"}, {"prompt": "why", "completion": "x"}]
    )
    rows = [
        {"prompt": "Please say: How many legs do four spiders have, if one of them lost two?", "completion": "thirty"},
        {"prompt": "tell me something", "completion": f"so he asked {asked} and left"},
        {"prompt": "how many legs do four beetles have", "completion": "24"},
        {"prompt": "say why", "completion": "because"},
    ]
    train = write_rows(tmp_path / "train.jsonl", rows)
    sources = sources_of(
        files={"train": {"path": train}, "test": {"path": test, "split": "test"}},
    )
    changed = {"kinds": ["sft"], "validation_fraction": 0.25, "test_fraction": 0.0}
    settled = {"sources": ["test"], "words": 4, "overlap": 0.5}
    sources["files"]["train"]["split"] = "train"
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": "quite another thing", "completion": "yes"}])
    sources["files"]["held"] = sources["files"]["train"] | {"path": held, "split": "validation"}
    rows_of, metrics = read_and_prepare(tmp_path, sources, decontamination=settled, **changed)
    assert metrics["train/sft/dropped/contaminated"] == 2
    assert [row["messages"][0]["content"] for row in rows_of["train/sft"]] == [row["prompt"] for row in rows[2:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": []}, "kinds must name at least one kind"),
        ({"kinds": ["sft", "sft"]}, "kinds must name at least one kind, and each once"),
        ({"kinds": ["sfd"]}, "did you mean 'sft'?"),
        ({"test_fraction": -0.1}, "test_fraction must be at least 0 and below 1, found -0.1"),
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and below 1, found 1.0"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave nothing for training"),
        ({"decontamination": {"sources": [], "words": 8, "overlap": 0.5}}, "sources must name at least one"),
    ],
)
def test_contradictory_settings_are_refused(changes, message):
    with pytest.raises(StageError) as caught:
        build(PrepareData, block(PrepareData, **changes), "params.yaml: prepare_data")
    assert "params.yaml: prepare_data" in str(caught.value)
    assert message in str(caught.value)


def checked(sources, **changed):
    require_served(
        build(PrepareData, block(PrepareData, **changed), "prepare_data"), build(Sources, sources, "sources")
    )


def test_a_kind_that_no_source_serves_is_told_before_anything_runs():
    sources = sources_of(files={"own": {"kinds": ["sft"]}}, tasks={"made": {"sft_rows": 0, "prompt_rows": 0}})
    checked(sources, kinds=["sft", "preference"])
    for kind in ("unpaired", "prompts"):
        with pytest.raises(StageError, match=f"prepare_data.kinds: no source serves {kind}"):
            checked(sources, kinds=["sft", kind])
    assert may_have_margins(build(Sources, sources_of(files={"own": {"kinds": ["preference"]}}), "sources"))
    assert not may_have_margins(build(Sources, sources, "sources"))


def test_decontamination_names_sources_of_split_test():
    sources = sources_of(files={"own": {}, "bench": {"split": "test"}})

    def against(name):
        return {"kinds": ["sft"], "decontamination": {"sources": [name], "words": 8, "overlap": 0.5}}

    checked(sources, **against("bench"))
    with pytest.raises(StageError, match=r"no source is named benhc; did you mean 'bench'\?"):
        checked(sources, **against("benhc"))
    with pytest.raises(StageError, match=r"sources.files.own.split is not test"):
        checked(sources, **against("own"))


SIZES = {"sft_rows": 40, "preference_rows": 40, "prompt_rows": 20, "validation_rows": 10, "test_rows": 20}


def test_film_reviews_are_generated_the_same_each_time_and_in_their_own_splits(tmp_path):
    sources = sources_of(tasks={"films": SIZES})
    for name in ("first", "second"):
        rows_of, metrics = read_and_prepare(tmp_path / name, sources)
    assert bytes_below(tmp_path / "first/data") == bytes_below(tmp_path / "second/data")
    sizes = {
        f"{split}/{kind}": len(rows) for kind in PAIRS for split in SPLITS for rows in [rows_of[f"{split}/{kind}"]]
    }
    assert sizes == {
        **{f"train/{kind}": size for kind, size in zip(PAIRS, (40, 40, 20), strict=True)},
        **{f"validation/{kind}": 10 for kind in PAIRS},
        **{f"test/{kind}": 20 for kind in PAIRS},
    }
    assert 0.5 < metrics["bayes_accuracy"] <= 1
    assert not [key for key in metrics if "dropped" in key]


def test_the_bayes_accuracy_is_left_out_where_other_pairs_are_tested(tmp_path):
    own = write_rows(tmp_path / "own.jsonl", [pair(f"ask {n}") for n in range(10)])
    sources = sources_of(tasks={"films": SIZES}, files={"own": {"path": own, "kinds": ["preference"]}})
    _, metrics = read_and_prepare(tmp_path, sources)
    assert "bayes_accuracy" not in metrics


def test_real_human_preferences(tmp_path):
    """Counts from the file itself, with no code of ours but the rule: the last marker ends the prompt."""
    raw = real_file("data/hh-rlhf")
    sources = sources_of(files={"hh": {"path": str(raw.resolve()), "kinds": PAIRS}})
    rows_of, _ = read_and_prepare(tmp_path, sources, test_fraction=0.1)
    with gzip.open(raw / "harmless-base/test.jsonl.gz", "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    split = [[row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")] for row in pairs]
    kept = [
        (chosen, rejected)
        for chosen, rejected in split
        if chosen[2].strip() and rejected[2].strip() and chosen[0] == rejected[0]
    ]
    # Of the rows left, four hold two turns in a row of one role.
    assert len(all_rows(rows_of, "preference")) == len(kept) - 4 == 2299
    assert len(rows_of["test/prompts"]) == 230
    replies = {(chosen[2].strip(), rejected[2].strip()) for chosen, rejected in kept}
    for one, other in combinations(SPLITS, 2):
        for left, right in ((one, other), (other, one)):
            asked = {json.dumps(row["prompt"])[:-1] for row in rows_of[f"{left}/prompts"]}
            told = [json.dumps(row["messages"]) for row in rows_of[f"{right}/sft"]]
            assert not [prompt for prompt in asked if any(text.startswith(prompt) for text in told)]
    for row in rows_of["test/preference"]:
        assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) in replies
        assert row["prompt"][-1]["role"] == "user"


def test_prompts_need_no_validation_rows(tmp_path):
    """Nothing reads them: a train file and a test file of prompts are enough."""
    for name in ("train", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {number}"} for number in range(3)])
    files = {
        name: {"path": str(tmp_path / f"{name}.jsonl"), "kinds": ["prompts"], "split": name}
        for name in ("train", "test")
    }
    rows_of, metrics = read_and_prepare(tmp_path, sources_of(files=files), kinds=["prompts"])
    assert [len(rows_of[f"{split}/prompts"]) for split in SPLITS] == [3, 0, 3]
    assert metrics["prompts/validation_rows"] == 0
