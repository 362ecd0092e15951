"""Reference log-probs that are not those of the tokens and the model beside them: refused, each with one line."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash
from stages.lib.data.reference_tables import LOG_PROBS, TOKEN_LOG_PROBS, read_reference
from stages.lib.data.token_tables import (
    PREFERENCE_SCHEMA,
    REFERENCE_SCHEMA,
    TOKEN_REFERENCE_SCHEMA,
    read_note,
    read_table,
    write_table,
)
from stages.lib.runs import training_run
from tests.stages.tiny_pipeline import call, change, contents, refusal
from tests.tables import Columns, rewrite

Copy = Callable[..., Path]
SPLITS = ("train", "validation")
BOTH = ("reference_chosen_logps", "reference_rejected_logps")


def shifted(columns: Columns) -> Columns:
    return columns | {name: [value - 500 for value in columns[name]] for name in BOTH}


def rolled(columns: Columns) -> Columns:
    return columns | {name: columns[name][-1:] + columns[name][:-1] for name in BOTH}


def at_100(columns: Columns) -> Columns:
    return columns | {name: [100.0] * len(columns[name]) for name in BOTH}


def of_another_model(folder: Path) -> Callable[[Columns], Columns]:
    """Those of the base model, under the notes of the fine-tuned one."""
    change(folder / "params.yaml", {"ref_logprobs": {"sft": {"model": "models/base"}}})
    call(folder, "ref_logprobs", out="data/other")
    change(folder / "params.yaml", {"ref_logprobs": {"sft": {"model": "models/sft"}}})
    tables = {
        len(table): table
        for table in (read_table(folder / f"data/other/sft/{split}.arrow", REFERENCE_SCHEMA) for split in SPLITS)
    }
    return lambda columns: tables[len(columns["row"])][:]


def test_a_table_names_what_it_was_made_from(tiny: Path) -> None:
    for split in SPLITS:
        path = tiny / f"data/ref_logprobs/sft/{split}.arrow"
        assert read_note(path, "tokens") == dvc_hash(tiny / f"data/tokens/{split}/preference.arrow")
        assert read_note(path, "model") == dvc_hash(tiny / "models/sft")
        assert read_note(path, "model_path") == "models/sft"


@pytest.fixture(scope="module")
def per_token(tiny: Path) -> Path:
    """Tables that also hold the log-prob of each token, of the tiny project's pairs."""
    change(tiny / "params.yaml", {"ref_logprobs": {"sft": {"per_token": True}}})
    try:
        call(tiny, "ref_logprobs", out="data/per_token")
    finally:
        change(tiny / "params.yaml", {"ref_logprobs": {"sft": {"per_token": False}}})
    return tiny / "data/per_token/sft"


@pytest.mark.parametrize("split", SPLITS)
def test_tokens_add_up_to_the_sums_and_leave_these_as_they_are(tiny: Path, per_token: Path, split: str) -> None:
    tokens_path = tiny / f"data/tokens/{split}/preference.arrow"
    tokens = read_table(tokens_path, PREFERENCE_SCHEMA)
    plain = read_reference(tiny / f"data/ref_logprobs/sft/{split}.arrow", tokens, tokens_path)
    table = read_reference(per_token / f"{split}.arrow", tokens, tokens_path, per_token_for="a test")
    assert table.select_columns(["row", *LOG_PROBS])[:] == plain[:]
    for sums, of_tokens, ids in zip(LOG_PROBS, TOKEN_LOG_PROBS, ("chosen_ids", "rejected_ids"), strict=True):
        for row in table:
            assert sum(row[of_tokens]) == pytest.approx(row[sums], rel=1e-5)
        assert [*map(len, table[of_tokens][:])] == [*map(len, tokens[ids][:])]
    # A loss that needs sums alone reads either table, and is given the sums alone.
    assert read_reference(per_token / f"{split}.arrow", tokens, tokens_path).column_names == ["row", *LOG_PROBS]


def test_a_run_broken_off_goes_on_to_the_same_bytes(
    copy_of_tiny: Copy, per_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stages.ref_logprobs as script

    folder, computed = copy_of_tiny(), []
    change(folder / "params.yaml", {"ref_logprobs": {"sft": {"per_token": True}}})

    def cut(*words: object) -> dict[str, list]:
        computed.append(words)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return compute(*words)

    compute = script.checked_logps
    monkeypatch.setattr(script, "checked_logps", cut)
    with pytest.raises(KeyboardInterrupt):
        call(folder, "ref_logprobs")
    call(folder, "ref_logprobs")
    assert len(computed) == 1 + 4  # chunks: three of the train rows, one of the validation rows
    assert contents(folder / "data/ref_logprobs/sft") == contents(per_token)


def test_a_table_without_what_a_loss_needs_is_refused_in_one_line(tiny: Path) -> None:
    tokens_path = tiny / "data/tokens/train/preference.arrow"
    tokens = read_table(tokens_path, PREFERENCE_SCHEMA)
    with pytest.raises(StageError) as refused:
        read_reference(tiny / "data/ref_logprobs/sft/train.arrow", tokens, tokens_path, per_token_for="LD-DPO")
    assert str(refused.value) == (
        f"{tiny}/data/ref_logprobs/sft/train.arrow has no log-probs of single tokens, which LD-DPO needs: set "
        "params.yaml: ref_logprobs.sft.per_token: true, and run the stage ref_logprobs again"
    )


@pytest.mark.parametrize("what", ["a token less", "another value"])
def test_changed_log_probs_of_tokens_are_refused(tiny: Path, per_token: Path, tmp_path: Path, what: str) -> None:
    path = shutil.copyfile(per_token / "train.arrow", tmp_path / "train.arrow")

    def put_in(columns: Columns) -> Columns:
        column = columns["reference_rejected_token_logps"]
        column[4] = column[4][1:] if what == "a token less" else [column[4][0] - 1e-3, *column[4][1:]]
        return columns

    rewrite(path, TOKEN_REFERENCE_SCHEMA, put_in, keep_digest=what == "another value")
    tokens_path = tiny / "data/tokens/train/preference.arrow"
    tokens = read_table(tokens_path, PREFERENCE_SCHEMA)
    message = {"a token less": r"row \d+, reference_rejected_token_logps: (\d+) log-probs of (\d+) tokens"}
    with pytest.raises(StageError, match=message.get(what, "does not hold the values that were written to it")):
        read_reference(path, tokens, tokens_path, per_token_for="a test")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("what", ["shifted", "rolled", "at 100", "of another model"])
def test_wrong_values_are_refused(copy_of_tiny: Copy, capsys: pytest.CaptureFixture, what: str, split: str) -> None:
    folder = copy_of_tiny()
    changes = {"shifted": shifted, "rolled": rolled, "at 100": at_100}
    changed = changes[what] if what in changes else of_another_model(folder)
    rewrite(folder / f"data/ref_logprobs/sft/{split}.arrow", REFERENCE_SCHEMA, changed)
    message = refusal(folder, "train_dpo", capsys)
    assert f"data/ref_logprobs/sft/{split}.arrow" in message
    assert message.endswith(" again")
    if what == "shifted":  # of both sides, which cancels in the margin
        assert "the log-prob of a chosen reply is 500 nats from the reference's" in message
    elif what == "at 100":
        assert "row 0, reference_chosen_logps: the log-prob is " in message
    else:
        assert "the margin of a pair is " in message


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, 1e-3])
@pytest.mark.parametrize("column", BOTH)
def test_a_value_that_is_no_log_prob_is_named_with_its_row(copy_of_tiny: Copy, column: str, value: float) -> None:
    folder = copy_of_tiny()
    path = folder / "data/ref_logprobs/sft/train.arrow"

    def put_in(columns: Columns) -> Columns:
        columns[column][5] = value
        return columns

    row = read_table(path, REFERENCE_SCHEMA)["row"][5]
    rewrite(path, REFERENCE_SCHEMA, put_in)
    with pytest.raises(
        StageError, match=rf"^data/ref_logprobs/sft/train\.arrow, row {row}, {column}: the log-prob is "
    ):
        call(folder, "train_dpo")


def test_one_value_changed_anywhere_is_noticed(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of_tiny()

    def shifted_last(columns: Columns) -> Columns:
        columns["reference_chosen_logps"][-1] -= 1e-3
        return columns

    rewrite(folder / "data/ref_logprobs/sft/train.arrow", REFERENCE_SCHEMA, shifted_last, keep_digest=True)
    assert "data/ref_logprobs/sft/train.arrow does not hold the values" in refusal(folder, "train_dpo", capsys)


def test_a_table_of_other_tokens_is_refused(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of_tiny()

    def with_another_token(columns: Columns) -> Columns:
        columns["chosen_ids"][3][0] ^= 1
        return columns

    for split in SPLITS[::-1]:
        rewrite(folder / f"data/tokens/{split}/preference.arrow", PREFERENCE_SCHEMA, with_another_token)
        message = f"{split}.arrow was made from other tokens than data/tokens/{split}/preference.arrow holds now"
        assert message in refusal(folder, "train_dpo", capsys)


def test_a_table_of_other_weights_of_the_start_is_refused(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    """As `make train-dpo ONLY=1` would have it after another fine-tuning."""
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_sft": {"sft": {"epochs": 1.0}}})
    call(folder, "train_sft")
    said = refusal(folder, "train_dpo", capsys)
    assert "train.arrow was made from another model than models/sft holds now" in said


def test_another_reference_than_the_start_is_no_mistake_and_its_distance_is_told(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture
) -> None:
    """Started at SFT with the base model as reference, and the other way round, h is the same but for its sign."""
    folder, told = copy_of_tiny(), []
    for start, reference in (("sft", "base"), ("base", "sft")):
        change(folder / "params.yaml", {"ref_logprobs": {"sft": {"model": f"models/{reference}"}}})
        change(folder / "params.yaml", {"train_dpo": {"dpo": {"model": f"models/{start}"}}})
        call(folder, "ref_logprobs")
        capsys.readouterr()
        call(folder, "train_dpo")
        told.append(re.findall(r"mean \|h\| to the reference of \S+ is (\S+) nats", capsys.readouterr().out))
    assert len(told[0]) == 2
    assert told[0] == told[1]
    assert float(told[0][0]) > 0.01
    first = pd.read_csv(folder / "metrics/curves/dpo.csv").iloc[0]
    assert abs(first["rewards/margins"]) > 1e-4


def test_a_policy_may_start_at_the_base_model_with_that_as_reference(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"ref_logprobs": {"sft": {"model": "models/base"}}})
    change(folder / "params.yaml", {"train_dpo": {"dpo": {"model": "models/base"}}})
    call(folder, "ref_logprobs")
    call(folder, "train_dpo")
    assert pd.read_csv(folder / "metrics/curves/dpo.csv")["rewards/margins"][0] == pytest.approx(0, abs=1e-5)


def test_a_table_of_earlier_code_is_refused(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of_tiny()
    path = folder / "data/ref_logprobs/sft/train.arrow"
    columns = read_table(path, REFERENCE_SCHEMA)[:]
    path.unlink()
    write_table(path, columns, REFERENCE_SCHEMA.with_metadata({"precision": "fp32", "base_quantization": "None"}))
    assert "does not hold the values that were written to it" in refusal(folder, "train_dpo", capsys)


@pytest.mark.parametrize("knobs", [{"micro_batch_tokens": 300}, {"packing": True}])
def test_in_bf16_rounding_passes_and_other_values_do_not(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, knobs: dict
) -> None:
    folder = copy_of_tiny()
    change(
        folder / "params.yaml",
        {"ref_logprobs": {"sft": {"precision": "bf16"}}, "train_dpo": {"dpo": {"precision": "bf16"}}},
    )
    call(folder, "ref_logprobs")
    change(folder / "runtime.yaml", {"default": knobs})
    call(folder, "train_dpo")
    assert abs(pd.read_csv(folder / "metrics/curves/dpo.csv")["rewards/margins"][0]) < 0.05
    rewrite(folder / "data/ref_logprobs/sft/train.arrow", REFERENCE_SCHEMA, rolled)
    assert "rounding in bf16 explains" in refusal(folder, "train_dpo", capsys)


def test_a_run_that_goes_on_is_compared_as_it_was_before_its_first_step(
    copy_of_tiny: Copy, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stages.train_dpo as script

    folder = copy_of_tiny()
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    compared, compare = [], script.require_start
    monkeypatch.setattr(script, "require_start", lambda *words: compared.append(words[3]) or compare(*words))
    record = training_run.TrainingRun.record

    def cut(self: training_run.TrainingRun, step: int, *words: object) -> None:
        record(self, step, *words)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_run.TrainingRun, "record", cut)
        with pytest.raises(KeyboardInterrupt):
            call(folder, "train_dpo")
    tables = [f"data/ref_logprobs/sft/{split}.arrow" for split in SPLITS]
    assert list(map(str, compared)) == tables
    call(folder, "train_dpo")  # weights from the checkpoint are further from the reference than rounding explains
    assert list(map(str, compared)) == 2 * tables
    assert contents(folder / "models/dpo") == contents(tiny / "models/dpo")
