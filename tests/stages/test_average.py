"""With `ema_decay` a training stage evaluates and publishes the average of its weights, worked out anew from them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stages.lib.command.entries import read_entry
from stages.lib.compute.batching import MicroBatching, micro_batching
from stages.lib.compute.engine.base import Engine
from stages.lib.compute.processes import Processes
from stages.lib.data.token_tables import PREFERENCE_SCHEMA, SFT_SCHEMA, read_table
from stages.lib.models.scalar_scores import SequenceScores
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.objectives.fit import global_means
from stages.lib.objectives.preference import PreferenceObjective
from stages.lib.objectives.reward import RewardObjective
from stages.lib.objectives.sft import SftObjective
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_dpo import TrainDpo
from stages.lib.settings.train_rm import TrainRm
from stages.train_dpo import Pairs
from tests.stages.test_training import curve, metrics
from tests.stages.tiny_pipeline import call, change_entries, inside
from tests.tiny_models import CPU

Copy = Callable[..., Path]
Weights = dict[str, torch.Tensor]
DECAY = 0.8
EVALUATED = [(stage, keep) for stage in ("train_sft", "train_rm", "train_dpo") for keep in ("last", "best")]
ROLLOUTS = "data/rollouts/ppo/rollouts.parquet"


class AveragedRun(NamedTuple):
    """What a stage's weights and their average were after each number of steps, from 0 on."""

    folder: Path
    stage: str
    weights: list[Weights]
    averages: list[Weights]

    @property
    def published(self) -> Path:
        return self.folder / "models" / self.stage.removeprefix("train_")

    @property
    def kept_step(self) -> int:
        return int(metrics(self.folder, self.stage).get("kept_step", len(self.weights) - 1))


def run_with_an_average(folder: Path, stage: str, keep: str | None, monkeypatch: pytest.MonkeyPatch) -> AveragedRun:
    optimizer = "optimizer" if keep else "policy_optimizer"
    values = {optimizer: {"ema_decay": DECAY}} | ({"keep": keep} if keep else {})
    change_entries(folder, {stage: values})
    weights: list[Weights] = []
    step = Engine.step

    def observed(engine: Engine) -> float:
        averages = engine.settings.ema_decay is not None  # PPO's critic does not
        if averages and not weights:
            weights.append(copy_of_masters(engine))
        norm = step(engine)
        if averages:
            weights.append(copy_of_masters(engine))
        return norm

    monkeypatch.setattr(Engine, "step", observed)
    call(folder, stage)
    return AveragedRun(folder, stage, weights, averages_of(weights))


def copy_of_masters(engine: Engine) -> Weights:
    """By their names in the model, which is the only part of the engine's module."""
    return {name.partition(".")[2]: master.detach().cpu().clone() for name, master in engine.masters.items()}


def averages_of(weights: list[Weights]) -> list[Weights]:
    """a_0 = w_0, a_t = d a_{t-1} + (1 - d) w_t; nothing is divided by 1 - d^t, for it does not start at 0."""
    averages = [{name: weight.double() for name, weight in weights[0].items()}]
    for own in weights[1:]:
        before = averages[-1]
        averages.append({name: DECAY * before[name] + (1 - DECAY) * weight.double() for name, weight in own.items()})
    return averages


def furthest(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between two numbers at the same place."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def held_out_loss(run: AveragedRun, weights: Weights | None = None) -> float:
    """What the stage's own loss is of the published model, with these weights in place of its own if any are given."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto_class = AutoModelForSequenceClassification if run.stage == "train_rm" else AutoModelForCausalLM
    model = auto_class.from_pretrained(run.published)
    if weights:
        names = model.load_state_dict(weights, strict=False)
        assert not names.unexpected_keys
        assert set(names.missing_keys) <= {"lm_head.weight"}  # the embeddings under a second name
    with inside(run.folder):
        batching = micro_batching(read_runtime(run.stage), model.config.pad_token_id, Processes(0, 1, CPU))
        return LOSSES[run.stage](model, batching)


def sft_loss(model: nn.Module, batching: MicroBatching) -> float:
    rows = read_table(Path("data/tokens/validation/sft.arrow"), SFT_SCHEMA)
    return global_means(SftObjective(batching), TokenLogProbs(model), rows[:], train=False)["loss"]


def rm_loss(model: nn.Module, batching: MicroBatching) -> float:
    pairs = read_table(Path("data/tokens/validation/preference.arrow"), PREFERENCE_SCHEMA)
    objective = RewardObjective(batching, read_entry("train_rm", TrainRm, None)[1].loss)
    return global_means(objective, SequenceScores(model), pairs[:], train=False)["loss"]


def dpo_loss(model: nn.Module, batching: MicroBatching) -> float:
    pairs = Pairs(Path("data/tokens/validation/preference.arrow"), Path("data/ref_logprobs/sft/validation.arrow"))
    objective = PreferenceObjective(batching, read_entry("train_dpo", TrainDpo, None)[1].loss)
    return global_means(objective, TokenLogProbs(model), pairs[:], train=False)["loss"]


LOSSES = {"train_sft": sft_loss, "train_rm": rm_loss, "train_dpo": dpo_loss}


@pytest.mark.parametrize(("stage", "keep"), [*EVALUATED, ("train_ppo", None)])
def test_the_average_of_the_weights_is_published(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, stage: str, keep: str | None
) -> None:
    run = run_with_an_average(copy_of_tiny(), stage, keep, monkeypatch)
    published = load_file(run.published / "model.safetensors")
    assert furthest(published, run.averages[run.kept_step]) < 1e-6
    assert furthest(published, run.weights[run.kept_step]) > 1e-4


@pytest.mark.parametrize(("stage", "keep"), EVALUATED)
def test_the_average_of_the_weights_is_evaluated(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, stage: str, keep: str
) -> None:
    run = run_with_an_average(copy_of_tiny(), stage, keep, monkeypatch)
    losses = {row + 1: loss for row, loss in curve(run.folder, stage)["validation/loss"].dropna().items()}
    assert len(losses) > 1
    for step, loss in losses.items():  # float32 holds a log-prob of some hundred nats to 3e-5
        assert loss == pytest.approx(held_out_loss(run, run.averages[step]), rel=1e-5)
        assert loss != pytest.approx(held_out_loss(run, run.weights[step]), rel=1e-4)
    reported = metrics(run.folder, stage)["validation_loss"]
    assert reported == pytest.approx(losses[run.kept_step], rel=1e-6)
    assert reported == pytest.approx(held_out_loss(run), rel=1e-5)


def test_rollouts_come_from_the_weights_themselves(
    copy_of_tiny: Copy, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with_an_average(copy_of_tiny(), "train_ppo", None, monkeypatch)
    assert (run.folder / ROLLOUTS).read_bytes() == (tiny / ROLLOUTS).read_bytes()
