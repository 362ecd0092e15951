"""The real training and evaluation scripts, tiny: what they write, what they promise, how they end on bad input."""

import json
import math
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.lib.command.errors import StageError
from stages.lib.compute.schedule import learning_rate
from stages.lib.data.token_tables import PREFERENCE_SCHEMA, read_table
from stages.lib.models.scalar_scores import TokenScores
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.models.tokenizer_files import TOKENIZER_FILES
from stages.lib.settings.declaration import block
from stages.lib.settings.kl_penalty import NoKl
from stages.lib.settings.preference_loss import IpoLoss
from stages.lib.settings.truncated import MissingEos
from tests.loaded_python import torchrun
from tests.stages.tiny_pipeline import call, change, contents, read_yaml, start
from tests.tables import rewrite, rollout_rows
from tests.tiny_models import batching

Copy = Callable[..., Path]


def curve(folder: Path, stage: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"metrics/curves/{stage.removeprefix('train_')}.csv")


def metrics(folder: Path, name: str) -> dict[str, float]:
    return json.loads((folder / f"metrics/{name.replace('train_', 'training/')}.json").read_text())


def weights(folder: Path, model: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"models/{model}/model.safetensors")


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of two sets of weights."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    return math.sqrt(difference / sum(float(tensor.double().square().sum()) for tensor in ours.values()))


def test_fine_tuning_lowers_the_held_out_loss(tiny: Path) -> None:
    results = metrics(tiny, "train_sft")
    assert results["validation_loss"] < results["validation_loss_before"]
    # An untrained model knows nothing: a uniform choice among v tokens costs ln v, and random logits of variance σ²
    # another σ²/2; with weights of variance 1/d that σ² is 1.
    config = json.loads((tiny / "models/base/config.json").read_text())
    assert results["validation_loss_before"] == pytest.approx(math.log(config["vocab_size"]) + 0.5, abs=0.25)


def test_preference_optimization_starts_at_ln_2(tiny: Path) -> None:
    first = curve(tiny, "train_dpo").iloc[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_policy_optimization_starts_at_the_reference(tiny: Path) -> None:
    rows = curve(tiny, "train_ppo")
    assert rows["objective/kl"][0] == 0
    assert list(rows["policy/updates"]) == [4, 4, 4]  # 2 epochs of 8 / 4 minibatches
    assert rows["objective/kl"][2] != 0


def test_every_rollout_is_published(tiny: Path) -> None:
    rollouts = rollout_rows(tiny, "ppo")
    assert [rollout["iteration"] for rollout in rollouts] == [1] * 8 + [2] * 8 + [3] * 8
    mean = sum(rollout["score"] for rollout in rollouts[:8]) / 8
    assert curve(tiny, "train_ppo")["objective/scores"][0] == pytest.approx(mean, abs=1e-5)


def test_scores_are_normalised_by_those_of_the_first_phase(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    changes = {"normalise_scores": "start", "score_clip": None, "truncated": block(MissingEos, penalty=0.0)}
    changes |= {"kl": block(NoKl), "held_out": {"kl_weight": 0.0}}
    change(folder / "params.yaml", {"train_ppo": {"ppo": changes}})
    call(folder, "train_ppo")
    scores = torch.tensor([rollout["score"] for rollout in rollout_rows(folder, "ppo")]).view(3, 8)
    wanted = (scores - scores[0].mean()) / scores[0].std()
    assert curve(folder, "train_ppo")["objective/rlhf_reward"].tolist() == pytest.approx(wanted.mean(dim=1), abs=1e-4)


def test_models_load_as_they_are_with_the_tokenizer_of_the_base(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("sft", "dpo", "ppo", "grpo", "rm"):
        for file in TOKENIZER_FILES:
            assert (tiny / f"models/{name}" / file).read_bytes() == (tiny / "models/base" / file).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tiny / "models/ppo")
    model = AutoModelForCausalLM.from_pretrained(tiny / "models/ppo")
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.dtype == torch.float32


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_scores_as_we_do(tiny: Path, side: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from stages.lib.models.scalar_scores import SequenceScores

    model = AutoModelForSequenceClassification.from_pretrained(tiny / "models/rm").eval()
    table = read_table(tiny / "data/tokens/validation/preference.arrow", PREFERENCE_SCHEMA)
    sequences = [row["prompt_ids"] + row["chosen_ids"] for row in table]
    tokenizer = AutoTokenizer.from_pretrained(tiny / "models/rm", padding_side=side)
    padded = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
    pad_id = model.config.pad_token_id
    (batch,) = batching(10**6, pad_id=pad_id).masked(sequences, sequences)
    with torch.no_grad():
        theirs = model(padded["input_ids"], attention_mask=padded["attention_mask"]).logits.squeeze(-1)
        alone = [float(model(torch.tensor([sequence])).logits) for sequence in sequences]
        ours = SequenceScores(model)(*batch.inputs, batch.end_mask)
    assert ours.tolist() == pytest.approx(theirs[batch.rows].tolist(), abs=1e-5)
    assert ours.tolist() == pytest.approx([alone[row] for row in batch.rows], abs=1e-5)


def test_the_published_reward_model_has_the_published_accuracy(copy_of_tiny: Copy, tiny: Path) -> None:
    """By the stage that evaluates it on test rows, were these the validation rows."""
    folder = copy_of_tiny()
    for path in ("data/tokens/{}/preference.arrow", "data/prepared/{}/preference.jsonl"):
        shutil.copy(folder / path.format("validation"), folder / path.format("test"))
    call(folder, "evaluate_rm@rm")
    found, told = metrics(folder, "evaluate_rm/rm"), metrics(tiny, "train_rm")
    assert found["accuracy"] == pytest.approx(told["validation_accuracy"])
    assert found["margin_mean"] == pytest.approx(told["validation_reward_margin"])


@pytest.mark.parametrize("stage", ["train_sft", "train_ppo"])
def test_another_micro_batch_size_gives_the_same_step(copy_of_tiny: Copy, tiny: Path, stage: str) -> None:
    folder = copy_of_tiny()
    change(folder / "runtime.yaml", {"default": {"micro_batch_tokens": 1}})
    call(folder, stage)
    model = stage.removeprefix("train_")
    assert distance(weights(tiny, model), weights(folder, model)) < 1e-5


def outs_of(folder: Path, stage: str) -> dict[str, bytes]:
    model = stage.removeprefix("train_")
    paths = [folder / f"models/{model}", folder / f"metrics/training/{model}.json"]
    paths.append(folder / f"metrics/curves/{model}.csv")
    if stage == "train_ppo":
        paths.append(folder / "data/rollouts/ppo")
    return {f"{path.name}/{name}": content for path in paths for name, content in contents(path).items()}


def kill_after_a_checkpoint(folder: Path, stage: str, number: int, launch: str = "") -> int:
    """Start a stage, send it a signal once it has written a checkpoint, and return its exit status."""
    earlier = set(folder.glob(".scratch/*/code-*/checkpoint-????????"))
    process = start(folder, stage, launch=launch)
    deadline = time.monotonic() + 120
    while not set(folder.glob(".scratch/*/code-*/checkpoint-????????")) - earlier:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    return process.returncode


def reached(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name[-8:]) for path in folder.glob(".scratch/*/code-*/checkpoint-????????")), default=0)


@pytest.mark.slow
def test_another_back_and_number_of_processes_goes_on(copy_of_tiny: Copy) -> None:
    """The averages, too: with them all that an optimizer holds goes from whole to shards and back."""
    undisturbed, folder = copy_of_tiny("undisturbed"), copy_of_tiny()
    for project in (undisturbed, folder):
        change(project / "params.yaml", {"train_sft": {"sft": {"optimizer": {"ema_decay": 0.8}}}})
    call(undisturbed, "train_sft")
    terminated = 128 + signal.SIGTERM
    for knobs, launch, status in (({}, "", terminated), ({"zero_stage": 2}, torchrun(), 1)):
        change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0, **knobs}})
        before = reached(folder)
        assert kill_after_a_checkpoint(folder, "train_sft", signal.SIGTERM, launch) == status
        assert reached(folder) > before  # or it began anew
    change(folder / "runtime.yaml", {"default": {"zero_stage": 3, "offload_optimizer": True}})
    last = reached(folder)
    process = start(folder, "train_sft")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"resuming from step {last}" in output
    assert distance(weights(undisturbed, "sft"), weights(folder, "sft")) < 1e-5
    assert metrics(folder, "train_sft") == pytest.approx(metrics(undisturbed, "train_sft"), rel=1e-5)


def refused(folder: Path, stage: str, **changed: str) -> str:
    """The one message with which a stage refuses to run."""
    with pytest.raises(StageError) as error:
        call(folder, stage, **changed)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kep": "best"}, "params.yaml: train_dpo.dpo.kep is not a known key; did you mean 'keep'?"),
        ({"beta": 0.1}, "params.yaml: train_dpo.dpo.beta is not a known key; did you mean 'loss.beta'?"),
        (
            {"loss": block(IpoLoss, beta="high")},
            "params.yaml: train_dpo.dpo.loss.beta: expected a number, found 'high' (str)",
        ),
        ({"loss": {"type": "sigmoyd", "beta": 0.1}}, "did you mean 'sigmoid'?"),
        (
            {"loss": block(IpoLoss) | {"label_smoothing": 0.1}},
            "train_dpo.dpo.loss.label_smoothing is not a known key",
        ),
    ],
)
def test_a_wrong_setting_is_named(copy_of_tiny: Copy, values: dict[str, Any], message: str) -> None:
    from tests.stages.tiny_pipeline import write_yaml

    folder = copy_of_tiny()
    settings = read_yaml(folder / "params.yaml")
    settings["train_dpo"]["dpo"].update(values)
    write_yaml(folder / "params.yaml", settings)
    assert message in refused(folder, "train_dpo")


def test_a_missing_setting_is_named(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text("\n".join(line for line in text.splitlines() if "gamma:" not in line))
    assert "params.yaml: train_ppo.ppo.gamma is missing" in refused(folder, "train_ppo")


def test_a_folder_that_is_no_model_is_refused(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_sft": {"sft": {"model": "data/raw"}}})
    assert "data/raw is not a model folder" in refused(folder, "train_sft")


def test_a_language_model_is_no_reward_model(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_ppo": {"ppo": {"reward_model": "models/dpo"}}})
    assert "models/dpo is not a reward model" in refused(folder, "train_ppo")


def test_a_critic_with_another_tokenizer_is_refused_with_what_else_there_is(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    file = folder / "models/rm/tokenizer.json"
    file.write_text(file.read_text() + "\n")
    said = refused(folder, "train_ppo")
    assert "models/rm has another tokenizer than models/sft" in said
    assert "let critic name models/sft (its body with a new head), or a reward model that was trained from it" in said


def test_a_token_outside_the_vocabulary_is_refused(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    path = folder / "data/tokens/train/preference.arrow"
    columns = read_table(path, PREFERENCE_SCHEMA)[:]
    columns["chosen_ids"][3][0] = 913657
    rewrite(path, PREFERENCE_SCHEMA, lambda _: columns)
    message = refused(folder, "train_rm")
    assert "train/preference.arrow, row 3" in message
    assert "913657" in message


def test_reference_log_probs_of_other_rows_are_refused(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    shutil.copy(folder / "data/ref_logprobs/sft/validation.arrow", folder / "data/ref_logprobs/sft/train.arrow")
    assert "was made from other rows" in refused(folder, "train_dpo")


def test_a_run_that_diverges_is_stopped(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(
        folder / "params.yaml", {"train_sft": {"sft": {"optimizer": {"learning_rate": 1e9, "schedule": "constant"}}}}
    )
    assert "training has diverged" in refused(folder, "train_sft")
    assert (folder / "models/sft/model.safetensors").is_file()


def test_a_second_writer_is_refused(copy_of_tiny: Copy) -> None:
    from stages.lib.runs.scratch import ScratchFolder
    from tests.stages.tiny_pipeline import inside

    folder = copy_of_tiny()
    with inside(folder):
        first = ScratchFolder("train_sft", {"a": 1}, [])
        with pytest.raises(StageError, match="is in use"):
            ScratchFolder("train_sft", {"a": 1}, [])
        ScratchFolder("train_sft", {"a": 2}, [])
        del first


@pytest.mark.slow
def test_a_mistake_is_one_message_and_exit_code_2(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_sft": {"sft": {"model": "data/raw"}}})
    process = start(folder, "train_sft")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.count("error:") == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_mistake_under_a_launcher_is_told_once(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_sft": {"sft": {"model": "data/raw"}}})
    process = start(folder, "train_sft", launch=torchrun())
    _, errors = process.communicate()
    assert process.returncode != 0
    assert errors.count("error: data/raw is not a model folder") == 1


def test_an_update_that_leads_too_far_is_taken_back(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_ppo": {"ppo": {"max_policy_kl": 1e-9, "epochs": 1}}})
    call(folder, "train_ppo")
    # The first update of each phase leads too far, so the policy stays SFT; the critic learns on.
    rows = curve(folder, "train_ppo")
    assert list(rows["policy/updates"]) == [0, 0, 0]
    assert list(rows["objective/kl"]) == [0, 0, 0]
    assert distance(weights(folder, "ppo"), weights(folder, "sft")) == 0
    # Two updates a phase are planned for each.
    settings = read_yaml(folder / "params.yaml")["train_ppo"]["ppo"]
    for column, optimizer, places in (
        ("learning_rate", "policy_optimizer", ((0, 6), (0, 4), (0, 2))),
        ("value/learning_rate", "critic", ((0, 6), (2, 6), (4, 6))),
    ):
        of = settings[optimizer].get("optimizer", settings[optimizer])
        schedule = (of["learning_rate"], of["warmup_ratio"], of["min_learning_rate_ratio"], of["schedule"])
        wanted = [learning_rate(step, total, *schedule) for step, total in places]
        assert rows[column].tolist() == pytest.approx(wanted, rel=1e-6)


def test_the_distance_of_a_policy_costs_no_pass_of_the_critic(
    copy_of_tiny: Copy, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    for kind in (TokenLogProbs, TokenScores):
        forward = kind.forward
        monkeypatch.setattr(
            kind,
            "forward",
            lambda self, *given, forward=forward, **options: (
                passes.append(type(self).__name__) or forward(self, *given, **options)
            ),
        )
    counts = []
    for limit in (None, 1e9):
        folder = copy_of_tiny(f"limit-{limit}")
        change(folder / "params.yaml", {"train_ppo": {"ppo": {"max_policy_kl": limit}}})
        passes.clear()
        call(folder, "train_ppo")
        counts.append(Counter(passes))
        assert distance(weights(folder, "ppo"), weights(tiny, "ppo")) == 0
    assert counts[1]["TokenScores"] == counts[0]["TokenScores"]
    assert counts[1]["TokenLogProbs"] == counts[0]["TokenLogProbs"] + 12  # one for each minibatch


def test_only_the_critic_learns_while_it_warms_up(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_ppo": {"ppo": {"critic_warmup_iterations": 1}}})
    call(folder, "train_ppo")
    rows = curve(folder, "train_ppo")
    assert list(rows["policy/updates"]) == [0, 4, 4]
    assert rows["objective/kl"][1] == 0  # the policy of the second phase is still SFT
    assert rows["objective/kl"][2] != 0
    assert rows["value/grad_norm"].min() > 0
    assert rows["learning_rate"][0] == rows["learning_rate"][1]
    assert rows["value/learning_rate"][1] < rows["value/learning_rate"][0]


def test_margins_are_wanted_where_they_are_used(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_rm": {"rm": {"loss": {"use_margin": True}}}})
    assert "data/tokens/train/preference.arrow, row 0 has no margin: set train_rm.rm.loss.use_margin: false" in refused(
        folder, "train_rm"
    )


def test_margins_change_the_loss_by_what_they_are(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    for split in ("train", "validation"):
        path = folder / f"data/tokens/{split}/preference.arrow"
        rewrite(path, PREFERENCE_SCHEMA, lambda columns: columns | {"margin": [1.5] * len(columns["row"])})
    change(folder / "params.yaml", {"train_rm": {"rm": {"loss": {"use_margin": True}}}})
    call(folder, "train_rm")
    # A new head scores all alike: -ln sigmoid(0 - 1.5) = 1.7014.
    assert curve(folder, "train_rm")["loss"][0] == pytest.approx(math.log(1 + math.exp(1.5)), abs=0.1)


def test_another_precision_than_the_references_is_refused(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_dpo": {"dpo": {"precision": "bf16"}}})
    said = "train_dpo.dpo: precision is bf16, but data/ref_logprobs/sft was computed with precision fp32"
    assert said in refused(folder, "train_dpo")


def test_a_model_that_lacks_weights_is_refused(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    file = folder / "models/sft/model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    said = refused(folder, "train_rm")
    assert "models/sft: 1 weights are missing or of another shape" in said
    assert "the first is model.layers.1.mlp.up_proj" in said
    file.write_bytes(file.read_bytes()[:1000])
    assert "models/sft cannot be loaded as AutoModelForCausalLM" in refused(folder, "ref_logprobs")


def test_tied_weights_are_saved_once(tiny: Path) -> None:
    assert "model.embed_tokens.weight" in weights(tiny, "sft")
    assert "lm_head.weight" not in weights(tiny, "sft")


def test_a_broken_model_is_told_by_the_row_it_fails_on(copy_of_tiny: Copy, tiny: Path) -> None:
    folder = copy_of_tiny()
    file = folder / "models/sft/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert "data/tokens/train/preference.arrow, row 0: its log-prob is nan" in refused(folder, "ref_logprobs")
    file.write_bytes((tiny / "models/sft/model.safetensors").read_bytes())
    file = folder / "models/rm/model.safetensors"
    tensors = load_file(file)
    tensors["score.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert "row 0: a score is nan; models/rm is broken" in refused(folder, "evaluate_rm@rm")
    assert "row 0: a score is nan; models/rm is broken" in refused(folder, "score_samples@sft")


def test_as_many_checkpoints_stay_as_runtime_yaml_says(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0, "kept_checkpoints": 3}})
    call(folder, "train_rm")
    names = sorted(path.name for path in folder.glob(".scratch/*/code-*/checkpoint-*"))
    assert names == [f"checkpoint-{step:08d}" for step in (4, 5, 6)]
