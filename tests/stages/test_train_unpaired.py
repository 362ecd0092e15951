"""KTO, BCO and APO on single replies: real stages, tiny, on the two replies of each pair as unpaired rows."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stages.lib.compute.batching import rows_of_step
from stages.lib.data.reference_tables import UNPAIRED_LOG_PROBS
from stages.lib.data.token_tables import UNPAIRED_REFERENCE_SCHEMA, UNPAIRED_SCHEMA, read_table
from stages.lib.runs import training_run
from stages.lib.settings.check import check_settings
from stages.lib.settings.declaration import block
from stages.lib.settings.ref_logprobs import RefLogprobsUnpaired
from stages.lib.settings.sources import FileSource
from stages.lib.settings.train_unpaired import TrainUnpaired
from stages.lib.settings.unpaired_loss import ApoZeroUnpairedLoss, BcoLoss, KtoLoss
from tests.stages.tiny_pipeline import call, change, contents, inside, read_yaml, refusal, write_yaml
from tests.tables import Columns, rewrite

Copy = Callable[..., Path]
KTO = block(KtoLoss, desirable_weight=1.5, undesirable_weight=0.5)
LOSSES = {"kto": KTO, "bco": block(BcoLoss), "apo": block(ApoZeroUnpairedLoss)}
SPLITS = ("train", "validation")


def with_unpaired_rows(folder: Path) -> None:
    """Good and bad replies of all pairs but for some bad ones, as rows and tokens, with a reference's log-probs."""
    counts = json.loads((folder / "metrics/prepare_data.json").read_text())
    for split in (*SPLITS, "test"):
        pairs = [*map(json.loads, (folder / f"data/prepared/{split}/preference.jsonl").read_text().splitlines())]
        rows = []
        for number, pair in enumerate(pairs):
            for side, label in (("chosen", True), ("rejected", False)):
                if label or number % 3:
                    rows.append({"prompt": pair["prompt"], "completion": pair[side], "label": label, "source": "films"})
        (folder / f"data/prepared/{split}/unpaired.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        counts[f"unpaired/{split}_rows"] = len(rows)
    (folder / "metrics/prepare_data.json").write_text(json.dumps(counts))
    params = read_yaml(folder / "params.yaml")
    params["prepare_data"]["kinds"].append("unpaired")
    (folder / "data/raw").mkdir(exist_ok=True)
    (folder / "data/raw/ratings.jsonl").touch()  # the source that the settings name
    params["sources"]["files"]["films"] = block(FileSource, path="data/raw/ratings.jsonl", kinds=["unpaired"])
    params["ref_logprobs_unpaired"] = {"sft": block(RefLogprobsUnpaired)}
    shared = {"batch_size": 8, "eval_every": 3, "epochs": 0.7}
    params["train_unpaired"] = {name: block(TrainUnpaired, loss=loss, **shared) for name, loss in LOSSES.items()}
    write_yaml(folder / "params.yaml", params)
    call(folder, "tokenize_data@unpaired")
    call(folder, "ref_logprobs_unpaired@sft")


@pytest.fixture(scope="module")
def unpaired(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the three losses have trained. Read only."""
    folder = tmp_path_factory.mktemp("unpaired") / "project"
    shutil.copytree(tiny, folder, symlinks=True, ignore=shutil.ignore_patterns(".scratch"))
    with_unpaired_rows(folder)
    for name in LOSSES:
        call(folder, f"train_unpaired@{name}")
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Copy:
    """Makes a copy of a project, without its training state."""

    def copy(project: Path) -> Path:
        ignored = shutil.ignore_patterns(".scratch")
        return Path(shutil.copytree(project, tmp_path / "project", symlinks=True, ignore=ignored))

    return copy


def curve_of(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"metrics/curves/{name}.csv")


FIRST = {"kto": "λ", "bco": math.log(2), "apo": 0.5}


@pytest.mark.parametrize("name", LOSSES)
def test_it_trains_from_its_known_first_value(unpaired: Path, name: str) -> None:
    curve = curve_of(unpaired, name)
    first, last = curve.iloc[0], curve.iloc[-1]
    rows = first_rows(unpaired)
    share = sum(rows["label"]) / len(rows["label"])
    assert first["loss"] == pytest.approx((1.5 * share + 0.5 * (1 - share)) / 2 if name == "kto" else FIRST[name])
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", *(("kl",) if name == "kto" else ())):
        assert first[metric] == pytest.approx(0, abs=1e-5)
        assert abs(last[metric]) > 1e-4
        assert math.isfinite(last[f"validation/{metric}"])
    shift = {"kto": "kl", "bco": "delta"}.get(name)
    assert {"kl", "delta"} & {*curve.columns} == ({shift} if shift else set())
    metrics = json.loads((unpaired / f"metrics/training/{name}.json").read_text())
    assert metrics["validation_loss"] == pytest.approx(last["validation/loss"], rel=1e-6)
    if name != "kto":  # whose loss depends on z0 as well
        assert metrics["validation_loss"] < first["loss"]
    assert (metrics["train_rows"], metrics["validation_rows"], metrics["steps"]) == (80, 20, 7)


def first_rows(folder: Path) -> dict[str, list]:
    table = read_table(folder / "data/tokens/train/unpaired.arrow", UNPAIRED_SCHEMA)
    return table[rows_of_step(0, len(table), 8, 0.7, 17)]


def test_every_prompt_stands_beside_a_reply_to_another_one(unpaired: Path) -> None:
    for split, path in ((split, unpaired / f"data/tokens/{split}/unpaired.arrow") for split in SPLITS):
        table = read_table(path, UNPAIRED_SCHEMA)
        replies = {tuple(row["completion_ids"]): tuple(row["prompt_ids"]) for row in table}
        for row in table:
            assert replies[tuple(row["mismatched_ids"])] != tuple(row["prompt_ids"])
        reference = read_table(unpaired / f"data/ref_logprobs_unpaired/sft/{split}.arrow", UNPAIRED_REFERENCE_SCHEMA)
        assert all(logp < 0 for name in UNPAIRED_LOG_PROBS for logp in reference[name][:])
    counts = json.loads((unpaired / "metrics/tokenize_data/unpaired.json").read_text())
    assert (counts["cut/mismatched"], counts["without_mismatched"]) == (0, 0)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_one_reply_a_pass_gives_the_same_steps(copy_of: Copy, unpaired: Path, name: str) -> None:
    """z0 and δ are of the whole step, however it is cut."""
    folder = copy_of(unpaired)
    change(folder / "runtime.yaml", {"default": {"micro_batch_tokens": 1}})
    call(folder, f"train_unpaired@{name}")
    expected, found = (curve_of(project, name) for project in (unpaired, folder))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-5)  # rewards are of sums of -300 nats in fp32


def test_resumed_equals_uninterrupted(copy_of: Copy, unpaired: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bco, whose δ goes on from where it was."""
    folder = copy_of(unpaired)
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    record = training_run.TrainingRun.record

    def cut(self: training_run.TrainingRun, step: int, *words: Any) -> None:
        record(self, step, *words)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_run.TrainingRun, "record", cut)
        with pytest.raises(KeyboardInterrupt):
            call(folder, "train_unpaired@bco")
    call(folder, "train_unpaired@bco")
    for out in ("models/bco", "metrics/curves/bco.csv", "metrics/training/bco.json"):
        assert contents(folder / out) == contents(unpaired / out)


def test_a_reference_without_mismatched_replies_serves_all_losses_but_kto(
    copy_of: Copy, unpaired: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_of(unpaired)
    change(folder / "params.yaml", {"ref_logprobs_unpaired": {"sft": {"mismatched": False}}})
    call(folder, "ref_logprobs_unpaired")
    call(folder, "train_unpaired@bco")
    assert (
        contents(folder / "models/bco")["model.safetensors"] == contents(unpaired / "models/bco")["model.safetensors"]
    )
    assert refusal(folder, "train_unpaired@kto", capsys) == (
        "error: data/ref_logprobs_unpaired/sft/train.arrow has no log-probs of mismatched replies, which the loss kto "
        "needs: set params.yaml: ref_logprobs_unpaired.sft.mismatched: true, and run the stage ref_logprobs again"
    )


def test_rows_of_one_prompt_are_told(copy_of: Copy, unpaired: Path, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of(unpaired)
    path = folder / "data/prepared/validation/unpaired.jsonl"
    rows = [*map(json.loads, path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row | {"prompt": rows[0]["prompt"]}) + "\n" for row in rows))
    call(folder, "tokenize_data@unpaired")
    assert json.loads((folder / "metrics/tokenize_data/unpaired.json").read_text())["without_mismatched"] == 20
    call(folder, "ref_logprobs_unpaired")
    said = refusal(folder, "train_unpaired@kto", capsys)
    assert "data/tokens/validation/unpaired.arrow: all rows have one prompt" in said
    call(folder, "train_unpaired@bco")


def shifted(columns: Columns) -> Columns:
    return columns | {"reference_logps": [value - 5 for value in columns["reference_logps"]]}


def changed_last(columns: Columns) -> Columns:
    columns["reference_mismatched_logps"][-1] -= 1e-3
    return columns


@pytest.mark.parametrize(
    ("changed", "keep_digest", "message"),
    [
        (shifted, False, "before the first update the log-prob of a reply is 5 nats from the reference's"),
        (changed_last, True, "does not hold the values that were written to it"),
    ],
)
def test_wrong_log_probs_are_refused(
    copy_of: Copy,
    unpaired: Path,
    capsys: pytest.CaptureFixture,
    changed: Callable[[Columns], Columns],
    keep_digest: bool,
    message: str,
) -> None:
    folder = copy_of(unpaired)
    for split in SPLITS[::-1]:
        path = folder / f"data/ref_logprobs_unpaired/sft/{split}.arrow"
        rewrite(path, UNPAIRED_REFERENCE_SCHEMA, changed, keep_digest=keep_digest)
        said = refusal(folder, "train_unpaired@kto", capsys)
        assert f"data/ref_logprobs_unpaired/sft/{split}.arrow" in said
        assert message in said


def test_log_probs_of_other_tokens_are_refused(copy_of: Copy, unpaired: Path, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of(unpaired)

    def with_other_labels(columns: Columns) -> Columns:
        return columns | {"label": [not label for label in columns["label"]]}

    rewrite(folder / "data/tokens/train/unpaired.arrow", UNPAIRED_SCHEMA, with_other_labels)
    said = refusal(folder, "train_unpaired@kto", capsys)
    assert "train.arrow was made from other tokens than data/tokens/train/unpaired.arrow holds now" in said


def test_another_reference_than_the_start_is_no_mistake_and_its_distance_is_told(
    copy_of: Copy, unpaired: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_of(unpaired)
    change(folder / "params.yaml", {"ref_logprobs_unpaired": {"sft": {"model": "models/base"}}})
    call(folder, "ref_logprobs_unpaired")
    call(folder, "train_unpaired@kto")
    assert (
        "mean |log-ratio| to the reference of data/ref_logprobs_unpaired/sft/train.arrow is" in capsys.readouterr().out
    )
    assert abs(curve_of(folder, "kto")["rewards/margins"][0]) > 1e-4


def test_the_policies_are_evaluated_reported_and_in_the_lineage_like_others(copy_of: Copy, unpaired: Path) -> None:
    folder = copy_of(unpaired)
    params = read_yaml(folder / "params.yaml")
    params["evaluate"]["policies"]["kto"] = "models/kto"
    params["score_samples"]["policies"].append("kto")
    write_yaml(folder / "params.yaml", params)
    with inside(folder):
        assert not check_settings()
    for stage in ("evaluate@kto", "score_samples@kto", "report"):
        call(folder, stage)
    page = (folder / "metrics/report.html").read_text()
    assert "models/kto" in page or ">kto<" in page
    card = (folder / "models/kto/README.md").read_text()
    assert "train_unpaired" in card
