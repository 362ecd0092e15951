"""A mixture of experts through the stages that train on tables: the routers' loss in their curves, and what it does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.stages.test_training import curve, metrics
from tests.stages.tiny_pipeline import call, change, change_entries, refusal, use_base

Copy = Callable[..., Path]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
EXPERTS, CHOSEN = 4, 2
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}


def router_loss(over: str, coefficient: float = 0.01) -> dict[str, object]:
    return {"router_loss": {"coefficient": coefficient, "over": over}}


@pytest.fixture(scope="module")
def mixture(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project, with a Mixtral for its base, up to DPO."""
    folder = tmp_path_factory.mktemp("mixture") / "project"
    shutil.copytree(tiny, folder, symlinks=True, ignore=shutil.ignore_patterns(".scratch"))
    torch.manual_seed(0)
    base = json.loads((folder / "models/base/config.json").read_text())
    special = {name: base[name] for name in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")}
    MixtralForCausalLM(MixtralConfig(**SIZES, **special)).save_pretrained(folder / "models/given")
    for name in TOKENIZER:
        if (folder / "models/base" / name).exists():
            shutil.copy(folder / "models/base" / name, folder / "models/given")
    use_base(folder, "files", path="models/given")
    call(folder, "prepare_base_files@base")
    losses = {
        "train_sft": router_loss("batch", 0.5),
        "train_rm": router_loss("sequence"),
        "train_dpo": router_loss("batch"),
    }
    change_entries(folder, losses)
    for stage in ("train_sft@sft", "train_rm@rm", "ref_logprobs@sft", "train_dpo@dpo"):
        call(folder, stage)
    return folder


def test_curves_show_the_loss_and_the_load_of_the_busiest_expert(mixture: Path) -> None:
    for stage in ("train_sft", "train_rm", "train_dpo"):
        for name in ("router_loss", "validation/router_loss"):
            found = curve(mixture, stage)[name].dropna()
            assert len(found)
            assert found.between(CHOSEN - 0.5, EXPERTS).all(), (stage, name)
        for name in ("most_loaded_expert", "validation/most_loaded_expert"):
            assert curve(mixture, stage)[name].dropna().between(1 / EXPERTS, 1 / CHOSEN).all(), (stage, name)


def test_the_stage_itself_trains_as_ever(mixture: Path) -> None:
    results = metrics(mixture, "train_sft")
    assert results["validation_loss"] < results["validation_loss_before"]
    assert curve(mixture, "train_dpo")["loss"].iloc[0] == pytest.approx(0.693147, abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(mixture / "models/dpo")
    assert model.config.num_local_experts == EXPERTS


@pytest.mark.parametrize("stage", ["train_sft", "train_rm", "train_dpo"])
def test_one_row_a_pass_and_packing_give_the_same_curve(mixture: Path, tmp_path: Path, stage: str) -> None:
    copy = Path(shutil.copytree(mixture, tmp_path / "copy", symlinks=True, ignore=shutil.ignore_patterns(".scratch")))
    knobs = {"micro_batch_tokens": 300, "packing": True} if stage == "train_sft" else {"micro_batch_tokens": 1}
    change(copy / "runtime.yaml", {"default": knobs})
    call(copy, {"train_sft": "train_sft@sft", "train_rm": "train_rm@rm", "train_dpo": "train_dpo@dpo"}[stage])
    ours, theirs = curve(copy, stage), curve(mixture, stage)
    for name in ("loss", "router_loss", "most_loaded_expert", "grad_norm", "validation/router_loss"):
        assert ours[name].dropna().tolist() == pytest.approx(theirs[name].dropna().tolist(), rel=1e-3), name


def test_a_strong_loss_balances_the_experts(mixture: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(mixture, tmp_path / "copy", symlinks=True, ignore=shutil.ignore_patterns(".scratch")))
    change_entries(copy, {"train_sft": router_loss("batch", 1e-6)})
    call(copy, "train_sft@sft")
    balanced, free = (curve(folder, "train_sft")["router_loss"] for folder in (mixture, copy))
    assert balanced.iloc[0] == free.iloc[0]
    assert balanced.iloc[-1] < free.iloc[-1]


def test_a_dense_model_is_refused(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of_tiny()
    change_entries(folder, {"train_dpo": router_loss("batch")})
    line = refusal(folder, "train_dpo@dpo", capsys)
    assert "params.yaml: train_dpo.dpo.router_loss: LlamaForCausalLM has no router that transformers knows" in line
