"""Reference log-probs that are not those of the tokens and the model beside them: refused, each with one line."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash
from stages.lib.data.token_tables import PREFERENCE_SCHEMA, REFERENCE_SCHEMA, read_note, read_table, write_table
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
