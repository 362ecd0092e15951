"""Sections that contradict each other, runtime.yaml or the model are refused by the names of their keys."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.models.model_facts import ModelFacts, read_model_facts
from stages.lib.settings.agreement import require_agreement, require_model_fits, require_paths
from stages.lib.settings.critic import SeparateCritic
from stages.lib.settings.declaration import block
from stages.lib.settings.named_models import NAMED
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.preference_loss import IpoLoss
from stages.lib.settings.prepare_base import ModelOfFolder, NewModel
from stages.lib.settings.reward_loss import PairwiseLoss, RegressionLoss
from stages.lib.settings.reward_servers import RewardServer
from stages.lib.settings.runtime import STAGES, Runtime, runtime_of
from stages.lib.settings.sections import KINDS, default_params
from stages.lib.settings.served_rewards import RemoteReward
from stages.lib.settings.sources import FileSource
from tests.real_files import PROJECT

LORA = {"rank": 4, "alpha": 8, "targets": "all-linear", "rslora": False, "save_adapter": False}
LORA |= {"experts": False, "routers": False}
NF4 = LORA | {"base_quantization": "nf4"}
WHOLE = LORA | {"base_quantization": None}
BF16 = {section: {"precision": "bf16"} for section in STAGES}
UNPAIRED = {"kinds": ["sft", "preference", "prompts", "unpaired"]}
OUTS = (
    "data/prepared/train",
    "data/prepared/test",
    "data/tokens",
    "models/base",
    "models/sft",
    "metrics/report.html",
)


def params(**changed: dict[str, Any]) -> dict[str, Any]:
    """Settings of the default run, with values of a section changed or, where it has entries, of each of them."""
    values = default_params()
    for section, own in changed.items():
        if section in NAMED:
            values[section] = {name: entry | own for name, entry in values[section].items()}
        else:
            values[section] |= own
    return {key: build(kind, values[key], key) for key, kind in KINDS.items()}


def runtimes(default: dict[str, Any] | None = None, **stages: dict[str, Any]) -> dict[str, Runtime]:
    document = deepcopy(load_yaml(PROJECT / "runtime.yaml"))
    document["default"] |= default or {}
    return {stage: runtime_of(stage, document | stages, Path("runtime.yaml")) for stage in STAGES}


def test_a_reward_names_a_server_of_runtime_yaml() -> None:
    own = params(train_grpo={"rewards": {"served": block(RemoteReward, server="ours")}})
    address = block(RewardServer)
    require_agreement(own, runtimes(train_grpo={"reward_servers": {"ours": address}}))
    message = r"params.yaml: train_grpo.grpo.rewards.served.server: runtime.yaml: reward_servers has no 'ours'; did you"
    with pytest.raises(StageError, match=message):
        require_agreement(own, runtimes({"reward_servers": {"our": address}}))


def test_the_default_settings_agree() -> None:
    require_agreement(params(), runtimes())
    require_agreement(params(**BF16), runtimes({"zero_stage": 2, "engine": "deepspeed"}))
    require_agreement(params(**BF16), runtimes({"attention": "flash_attention_2", "packing": True}))
    require_agreement(params(train_dpo={"lora": NF4}, ref_logprobs={"base_quantization": "nf4"}), runtimes())
    require_agreement(params(train_sft={"lora": NF4}), runtimes(train_rm={"zero_stage": 3}))
    require_agreement(params(**BF16), runtimes({"deepspeed": {"comms_logger": {}}, "frozen_zero_stage": 3}))


@pytest.mark.parametrize(
    ("settings", "how", "message"),
    [
        (
            {"train_dpo": {"precision": "bf16"}},
            {},
            "params.yaml: ref_logprobs.sft.precision is fp32 and train_dpo.dpo.precision bf16",
        ),
        (
            {"ref_logprobs": {"base_quantization": "nf4"}},
            {},
            "ref_logprobs.sft.base_quantization is nf4 and train_dpo.dpo.lora.base_quantization null",
        ),
        (
            {"train_dpo": {"lora": NF4}},
            {},
            "ref_logprobs.sft.base_quantization is null and train_dpo.dpo.lora.base_quantization nf4",
        ),
        (
            {"train_rm": {"kind": "unpaired", "loss": block(RegressionLoss)}, "prepare_data": UNPAIRED},
            {},
            "params.yaml: train_rm.rm.loss: regression needs scores, which no source of kind unpaired has",
        ),
        (
            {"train_rm": {"kind": "unpaired", "loss": block(RegressionLoss)}},
            {},
            "params.yaml: train_rm.rm needs rows of kind unpaired, which prepare_data.kinds lacks",
        ),
        (
            {"train_rm": {"loss": block(PairwiseLoss, use_margin=True)}},
            {},
            "params.yaml: train_rm.rm.loss.use_margin: the pairs of sources.tasks have no margin",
        ),
        (
            {"train_sft": {"precision": "bf16"}},
            {"default": {"attention": "flash_attention_2"}},
            "runtime.yaml: train_rm: attention: flash_attention_2 computes in bf16, not in fp32",
        ),
        (
            BF16,
            {"evaluate": {"attention": "flash_attention_2", "device": "cpu"}},
            "runtime.yaml: evaluate: attention: flash_attention_2 needs a GPU",
        ),
        (
            BF16,
            {"train_ppo": {"engine": "deepspeed"}},
            "runtime.yaml: train_ppo: engine: deepspeed cannot train in bf16 with zero_stage: 0; set it to 1, 2 or 3",
        ),
        (
            BF16,
            {"train_sft": {"deepspeed": {"comms_logger": {}}}},
            "runtime.yaml: train_sft: deepspeed: in bf16 these keys need zero_stage 1, 2 or 3",
        ),
        (
            {"train_sft": {"lora": NF4}},
            {"default": {"zero_stage": 3}},
            "runtime.yaml: train_sft: zero_stage: 3 cannot shard a base of base_quantization: nf4; use 0, 1 or 2",
        ),
        (
            {"train_dpo": {"lora": NF4}, "ref_logprobs": {"base_quantization": "nf4"}},
            {"ref_logprobs": {"frozen_zero_stage": 3}},
            "runtime.yaml: ref_logprobs: frozen_zero_stage: 3 cannot shard a base",
        ),
        (
            {"train_rm": {"optimizer": block(OptimizerSettings, moments="8bit")}},
            {"train_rm": {"zero_stage": 1}},
            "runtime.yaml: train_rm: optimizer.moments: 8bit needs plain torch; set engine: torch, or moments: float32",
        ),
        (
            {"train_ppo": {"critic": block(SeparateCritic, optimizer=block(OptimizerSettings, moments="paged"))}},
            {"train_ppo": {"device": "cpu"}},
            "runtime.yaml: train_ppo: critic.optimizer.moments: paged needs a GPU; set device: cuda, or float32",
        ),
    ],
)
def test_what_cannot_both_be_obeyed_is_refused(settings: dict, how: dict, message: str) -> None:
    with pytest.raises(StageError) as caught:
        require_agreement(params(**settings), runtimes(**how))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("section", "changed", "message"),
    [
        (
            "train_grpo",
            {"minibatch_size": 48},
            "rollout_batch_size (32) times samples_per_prompt (4) must be a multiple of minibatch_size (48)",
        ),
        (
            "train_grpo",
            {"samples_per_prompt": 1, "minibatch_size": 32},
            "samples_per_prompt must be at least 2, found 1",
        ),
        ("train_grpo", {"top_entropy_share": 0.0}, "train_grpo.grpo.top_entropy_share must be above 0"),
        ("train_ppo", {"minibatch_size": 7}, "must be a multiple of minibatch_size (7)"),
        (
            "train_dpo",
            {"loss": {"type": "ipoo"}},
            "train_dpo.dpo.loss.type: 'ipoo' (str) is not one of: sigmoid, robust",
        ),
        (
            "train_dpo",
            {"loss": block(IpoLoss) | {"label_smoothing": 0.1}},
            "train_dpo.dpo.loss.label_smoothing is not a known key",
        ),
        ("evaluate", {"max_promts": 3}, "evaluate.max_promts is not a known key; did you mean 'max_prompts'?"),
        (
            "train_rm",
            {"lora": NF4 | {"base_quantization": "nf5"}},
            "train_rm.rm.lora.base_quantization: 'nf5' (str) is not one",
        ),
    ],
)
def test_a_later_section_is_built_too(section: str, changed: dict, message: str) -> None:
    with pytest.raises(StageError) as caught:
        params(**{section: changed})
    assert message in str(caught.value)


def facts(**changed: Any) -> ModelFacts:
    config = {"model_type": "llama", "vocab_size": 1024, "max_position_embeddings": 192} | changed
    return read_model_facts(config, "config.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tokenize_data": {"max_length": 193}},
            "params.yaml: tokenize_data.max_length is 193, but m has 192 positions; lower it",
        ),
        (
            {"train_ppo": {"max_new_tokens": 97}},
            "tokenize_data.max_prompt_length + train_ppo.ppo.max_new_tokens is 193, but m has",
        ),
        (
            {"train_grpo": {"max_new_tokens": 97}},
            "tokenize_data.max_prompt_length + train_grpo.grpo.max_new_tokens is 193, but m has",
        ),
        (
            {"evaluate": {"max_new_tokens": 4000}},
            "tokenize_data.max_prompt_length + evaluate.max_new_tokens is 4096, but m has",
        ),
    ],
)
def test_lengths_keep_to_the_models_positions(settings: dict, message: str) -> None:
    assert require_model_fits(facts(), "m", params(), runtimes()) == []
    with pytest.raises(StageError) as caught:
        require_model_fits(facts(), "m", params(**settings), runtimes())
    assert message in str(caught.value)
    assert require_model_fits(facts(max_position_embeddings=None), "m", params(**settings), runtimes()) == []


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "gptj", "gpt_neo", "bloom"])
def test_a_kernel_that_an_architecture_lacks_is_refused_by_our_key(model_type: str) -> None:
    model = facts(model_type=model_type)
    with pytest.raises(StageError) as caught:
        require_model_fits(model, "models/own", params(), runtimes(train_rm={"attention": "eager"}))
    assert str(caught.value).startswith(
        f"runtime.yaml: train_sft: attention: sdpa is not there for models of type {model_type}"
    )
    assert str(caught.value).split("set it to ")[1].split(" or ")[0] == "eager"
    require_model_fits(model, "models/own", params(), runtimes({"attention": "eager"}))


def test_an_architecture_without_a_classifier_is_a_warning() -> None:
    (said,) = require_model_fits(facts(model_type="granite"), "models/own", params(), runtimes({"attention": "eager"}))
    assert said.startswith("models of type granite, as models/own is, have no sequence classifier in transformers")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in ("data/raw/rows.jsonl", "models/own/config.json", "models/base/x", "stages/chat_templates/chat.jinja"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    (tmp_path / "data/raw/tracked.dvc").touch()
    (tmp_path / "link").symlink_to("models/base")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(source: str | None, base: dict[str, Any], kinds: tuple[str, ...] = ("sft", "preference")) -> None:
    """Check a source's path, and a model to start from: of a folder if it has a path, else a new one."""
    files = {} if source is None else {"mine": block(FileSource, path=source)}
    groups: dict[str, Any] = {"scratch": {}, "files": {}, "hub": {}}
    if "path" in base:
        groups["files"] = {"base": block(ModelOfFolder, **base)}
    else:
        groups["scratch"] = {"base": block(NewModel, **base)}
    own = params(sources={"files": files}, prepare_base=groups, prepare_data={"kinds": list(kinds)})
    require_paths(own["sources"], own["prepare_data"], own["prepare_base"], OUTS)


@pytest.mark.parametrize(
    ("source", "base"),
    [
        (None, {}),
        ("data/raw/rows.jsonl", {"path": "models/own"}),
        ("data/raw/tracked/deeper", {"corpus": "data/raw/rows.jsonl"}),
        (None, {"corpus": "data/prepared/train/preference.jsonl"}),
        (None, {"path": "models/own", "chat_template": "chat.jinja"}),
    ],
)
@pytest.mark.usefixtures("project")
def test_paths_that_are_there_or_will_be_are_taken(source: str | None, base: dict) -> None:
    checked(source, base)


PATH, OWN = "sources.files.mine.path", "prepare_base.files.base.path"
CORPUS, TEMPLATE = "prepare_base.scratch.base.corpus", "prepare_base.scratch.base.chat_template"


@pytest.mark.parametrize(
    ("source", "base", "message"),
    [
        ("data/raw/gone.jsonl", {}, f"{PATH}: data/raw/gone.jsonl does not exist"),
        ("dangling", {}, f"{PATH}: dangling does not exist"),
        ("x" * 4000, {}, "xxx does not exist"),
        ("data/prepared/train", {}, f"{PATH}: data/prepared/train is, holds or lies in what a stage writes"),
        ("data", {}, f"{PATH}: data is, holds or lies in what a stage writes (data/prepared/train)"),
        (".", {}, "is, holds or lies in what a stage writes"),
        ("./models", {}, "is, holds or lies in what a stage writes (models/base)"),
        (None, {"path": "models/base"}, f"{OWN}: models/base is, holds or lies in what a stage writes"),
        (None, {"path": "link"}, f"{OWN}: link is, holds or lies in what a stage writes (models/base)"),
        (None, {"path": "models/gone"}, f"{OWN}: models/gone does not exist"),
        (None, {"corpus": "models/base/x"}, f"{CORPUS}: models/base/x is, holds or lies in what a stage writes"),
        (None, {"corpus": "data/raw/gone"}, f"{CORPUS}: data/raw/gone does not exist"),
        (
            None,
            {"corpus": "data/prepared/train/prompts.jsonl"},
            f"{CORPUS}: prepare_data writes no data/prepared/train/prompts.jsonl; it is to write "
            "data/prepared/train/sft.jsonl, data/prepared/train/preference.jsonl",
        ),
        (
            None,
            {"corpus": "data/prepared/sft/train.jsonl"},
            f"{CORPUS}: prepare_data writes no data/prepared/sft/train",
        ),
        (
            None,
            {"chat_template": "other.jinja"},
            f"{TEMPLATE}: stages/chat_templates has no file other.jinja; put it there, or name one of chat.jinja",
        ),
    ],
)
@pytest.mark.usefixtures("project")
def test_a_path_that_cannot_be_right_is_named(source: str | None, base: dict, message: str) -> None:
    with pytest.raises(StageError, match=r"^params.yaml: ") as caught:
        checked(source, base)
    assert message in str(caught.value)
