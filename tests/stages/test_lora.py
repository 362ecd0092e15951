"""The training scripts with low-rank adapters: what moves, what is published, and what stays exactly as it was."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from stages.lib.data.token_tables import PREFERENCE_SCHEMA, PROMPT_SCHEMA, SFT_SCHEMA, read_table
from tests.loaded_python import torchrun
from tests.stages.test_training import (
    curve,
    distance,
    metrics,
    refused,
    weights,
)
from tests.stages.tiny_pipeline import call, change, change_entries, inside, start
from tests.tables import rollout_rows

Copy = Callable[..., Path]
RANK = 2
BLOCK = {
    "rank": RANK,
    "alpha": 4,
    "targets": "all-linear",
    "experts": False,
    "routers": False,
    "rslora": False,
    "base_quantization": None,
}
BLOCK |= {"save_adapter": True}
# The model that each stage starts from, in the pipeline that the fixture copies.
BASES = {"sft": "base", "rm": "sft", "dpo": "sft", "ppo": "sft", "grpo": "sft"}


def use_lora(folder: Path, *stages: str, **changed: Any) -> Path:
    change_entries(folder, {stage: {"lora": {**BLOCK, **changed}} for stage in stages})
    return folder


@pytest.fixture(scope="module")
def adapted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project with each training stage run anew with adapters, on the models that stood in it before."""
    folder = tmp_path_factory.mktemp("adapted") / "project"
    shutil.copytree(tiny, folder, symlinks=True, ignore=shutil.ignore_patterns(".scratch"))
    stages = ("train_ppo", "train_grpo", "train_dpo", "train_rm", "train_sft")
    use_lora(folder, *stages)
    for stage in stages:
        call(folder, stage)
    return folder


def sequences(folder: Path) -> list[list[int]]:
    table = read_table(folder / "data/tokens/validation/preference.arrow", PREFERENCE_SCHEMA)
    return [row["prompt_ids"] + row["chosen_ids"] for row in table]


def logits(model: nn.Module, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(torch.tensor([ids])).logits.flatten() for ids in sequences(folder)])


@pytest.mark.parametrize("model", BASES)
def test_published_matrices_differ_from_the_base_by_the_adapters_rank(tiny: Path, adapted: Path, model: str) -> None:
    before, after = weights(tiny, BASES[model]), weights(adapted, model)
    assert after.keys() - before.keys() == ({"score.weight"} if model == "rm" else set())
    for name, weight in after.items():
        if "_proj" in name:
            singular = torch.linalg.svdvals((weight - before[name]).double())
            assert float(singular[0]) > 1e-6
            # Beyond the rank there is only the rounding of the sum to float32.
            assert float(singular[RANK:].max()) < 1e-6, name
        elif name != "score.weight":
            assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("model", ["sft", "rm"])
def test_peft_puts_the_adapter_on_the_base(tiny: Path, adapted: Path, model: str) -> None:
    from peft import PeftModel

    auto_class = AutoModelForSequenceClassification if model == "rm" else AutoModelForCausalLM
    options = {"num_labels": 1} if model == "rm" else {}
    base = auto_class.from_pretrained(tiny / "models" / BASES[model], **options)
    theirs = PeftModel.from_pretrained(base, adapted / f"models/{model}/adapter")
    assert theirs.peft_config["default"].base_model_name_or_path == f"models/{BASES[model]}"
    merged = auto_class.from_pretrained(adapted / f"models/{model}")
    ours = logits(merged, tiny)
    assert torch.allclose(logits(theirs, tiny), ours, rtol=1e-5, atol=1e-5)


def held_out_loss(model: nn.Module, folder: Path) -> float:
    """Cross-entropy per completion token, worked out row by row."""
    total, tokens = 0.0, 0
    for row in read_table(folder / "data/tokens/validation/sft.arrow", SFT_SCHEMA):
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            log_probs = torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1)
        logps = log_probs.gather(-1, ids[1:, None]).squeeze(-1)[torch.tensor(row["loss_mask"][1:])]
        total, tokens = total - float(logps.sum()), tokens + len(logps)
    return total / tokens


def test_the_published_model_is_the_one_that_was_evaluated(adapted: Path) -> None:
    results = metrics(adapted, "train_sft")
    assert results["validation_loss"] < results["validation_loss_before"]
    loss = held_out_loss(AutoModelForCausalLM.from_pretrained(adapted / "models/sft"), adapted)
    assert loss == pytest.approx(results["validation_loss"], abs=1e-5)


def test_metrics_count_what_is_trained(tiny: Path, adapted: Path) -> None:
    # Per layer: q, k, v and o are 32 x 32; gate, up and down 32 x 64; the head is 32.
    trained = 2 * RANK * (4 * (32 + 32) + 3 * (32 + 64))
    whole = sum(weight.numel() for weight in weights(tiny, "sft").values())
    for model in BASES:
        results, head = metrics(adapted, f"train_{model}"), 32 if model == "rm" else 0
        assert (results["trained_parameters"], results["total_parameters"]) == (trained + head, whole + trained + head)
        assert "trained_parameters" not in metrics(tiny, f"train_{model}")


def test_preference_optimization_starts_at_the_cached_reference(adapted: Path) -> None:
    first = curve(adapted, "train_dpo").iloc[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def rollouts(folder: Path) -> list[dict[str, Any]]:
    return rollout_rows(folder, "ppo")


def test_the_policy_starts_at_its_base_and_is_measured_against_it(tiny: Path, adapted: Path) -> None:
    kl = curve(adapted, "train_ppo")["objective/kl"]
    assert kl[0] == 0
    assert kl[1] != 0
    ours, theirs = (
        [row["response_ids"] for row in rollouts(folder) if row["iteration"] == 1] for folder in (adapted, tiny)
    )
    assert ours == theirs


def test_the_reward_model_does_not_learn_with_its_critic(tiny: Path, adapted: Path) -> None:
    """The last phase's scores, after twelve updates of the critic, are those of the model that went in."""
    reward_model = AutoModelForSequenceClassification.from_pretrained(tiny / "models/rm").eval()
    prompts = {}
    from stages.lib.data.token_tables import PROMPT_SCHEMA

    for row in read_table(tiny / "data/tokens/train/prompts.arrow", PROMPT_SCHEMA):
        prompts[row["row"]] = row["prompt_ids"]
    last = [row for row in rollouts(adapted) if row["iteration"] == 3]
    with torch.no_grad():
        scores = [float(reward_model(torch.tensor([prompts[row["row"]] + row["response_ids"]])).logits) for row in last]
    assert [row["score"] for row in last] == pytest.approx(scores, abs=1e-5)


def test_two_models_are_in_memory_instead_of_four(adapted: Path) -> None:
    from stages.lib.command.entries import read_entry
    from stages.lib.compute.processes import Processes
    from stages.lib.models.pretrained import Loading
    from stages.lib.settings.runtime import read_runtime
    from stages.lib.settings.train_ppo import TrainPpo
    from stages.train_ppo import load_parts

    alone = Processes(0, 1, torch.device("cpu"))
    with inside(adapted):
        _, settings = read_entry("train_ppo", TrainPpo, None)
        settings = settings.model_copy(update={"model": "models/ppo", "reference": "models/ppo"})
        loading = Loading(settings.precision, read_runtime("train_ppo"), alone.device)
        this_run = SimpleNamespace(
            scratch=None, processes=alone, may_stop=lambda: None, stage="train_ppo@ppo", runtime=loading.runtime
        )
        prompts = read_table(Path("data/tokens/train/prompts.arrow"), PROMPT_SCHEMA)
        parts = load_parts(settings, 17, loading, alone, str, this_run, prompts, None)
    reward = parts.collector.reward.by_name["reward_model"].reward
    trained = {id(weight) for part in (parts.policy, parts.critic) for weight in part.module.parameters()}
    frozen = [
        weight
        for module in (parts.collector.policy.reference.module.module, reward.scores.module)
        for weight in module.parameters()
    ]
    assert sum(weight.numel() for weight in frozen if id(weight) not in trained) == 32  # the reward model's head


def test_an_unknown_layer_is_refused(copy_of_tiny: Copy) -> None:
    folder = use_lora(copy_of_tiny(), "train_rm", targets=["q_proj", "c_attn"])
    message = refused(folder, "train_rm")
    assert "lora.targets: models/sft has no linear layer 'c_attn' in its body" in message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message


def test_a_reference_on_another_base_is_refused(copy_of_tiny: Copy) -> None:
    folder = use_lora(copy_of_tiny(), "train_dpo", base_quantization="nf4")
    message = refused(folder, "train_dpo")
    assert (
        "train_dpo.dpo: lora trains on base_quantization nf4, but data/ref_logprobs/sft was computed with " in message
    )


@pytest.fixture
def wider(copy_of_tiny: Copy) -> Path:
    """A project whose models/sft has rows of 64 weights and more, as the blocks of NF4 want them."""
    folder = copy_of_tiny()
    values = json.loads((folder / "models/sft/config.json").read_text())
    torch.manual_seed(0)
    config = LlamaConfig(**{**values, "hidden_size": 64, "head_dim": 32, "intermediate_size": 128})
    LlamaForCausalLM(config).save_pretrained(folder / "models/sft")
    return folder


def dequantized_base(folder: Path) -> dict[str, torch.Tensor]:
    """What NF4 makes of models/sft, by bitsandbytes alone."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    before = weights(folder, "sft")
    return {
        name: dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        if "_proj" in name
        else weight
        for name, weight in before.items()
    }


def test_adapters_on_a_4_bit_base_are_merged_into_what_it_computed(wider: Path) -> None:
    use_lora(wider, "train_dpo", base_quantization="nf4")
    change(wider / "params.yaml", {"ref_logprobs": {"sft": {"base_quantization": "nf4"}}})
    for stage in ("ref_logprobs", "train_dpo"):
        call(wider, stage)
    first = curve(wider, "train_dpo").iloc[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    base, after = dequantized_base(wider), weights(wider, "dpo")
    assert after.keys() == base.keys()
    for name, weight in after.items():
        singular = torch.linalg.svdvals((weight - base[name]).double()) if "_proj" in name else None
        if singular is None:
            assert torch.equal(weight, base[name])
        else:
            assert float(singular[0]) > 1e-6
            assert float(singular[RANK:].max()) < 1e-6, name
    config = json.loads((wider / "models/dpo/config.json").read_text())
    assert config == json.loads((wider / "models/sft/config.json").read_text())


@pytest.mark.slow
def test_a_4_bit_base_trains_alike_under_zero_2_and_is_refused_by_zero_3(wider: Path) -> None:
    use_lora(wider, "train_rm", base_quantization="nf4")
    call(wider, "train_rm")
    whole, results = weights(wider, "rm"), metrics(wider, "train_rm")
    shutil.rmtree(wider / ".scratch")  # or its finished result would be published again
    change(wider / "runtime.yaml", {"default": {"zero_stage": 2}})
    process = start(wider, "train_rm", launch=torchrun())
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert distance(whole, weights(wider, "rm")) < 1e-5
    assert metrics(wider, "train_rm") == pytest.approx(results, rel=1e-4, abs=1e-6)
    change(wider / "runtime.yaml", {"default": {"zero_stage": 3}})
    shutil.rmtree(wider / ".scratch")
    assert "ZeRO 3 cannot shard a base of base_quantization: nf4; use ZeRO 0, 1 or 2" in refused(wider, "train_rm")
