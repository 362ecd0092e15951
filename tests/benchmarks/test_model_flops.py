"""Model FLOPs, against numbers worked out by hand and against what torch counts while the stages' code runs."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.model_flops import Architecture, forward_flops, peak_flops, training_flops
from benchmarks.timed_steps import PARTS, prepare
from benchmarks.workloads import ARCHITECTURES, LORA_RANK, WORKLOADS, Configuration

TINY = ARCHITECTURES["tiny"]
QWEN = ARCHITECTURES["qwen2.5-1.5b"]


def test_the_weights_of_qwen_are_those_that_its_model_card_gives():
    # 1.31 billion without embeddings and 1.54 billion with them, to three digits: norms and biases change no more.
    assert f"{QWEN.body_weights / 1e9:.2f} {(QWEN.body_weights + QWEN.head_weights) / 1e9:.2f}" == "1.31 1.54"


def test_flops_by_hand():
    # One layer, 4 dimensions in 2 heads of 2, of which 1 for keys and values; 6 wide; 10 tokens known.
    small = Architecture(layers=1, hidden=4, heads=2, key_value_heads=1, intermediate=6, vocabulary=10)
    weights = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 6  # q, k, v, o; gate, up, down
    adapters = 3 * (8 + 6 + 6 + 8 + 3 * 10)  # rank 3
    attention = 2 * (2 * 4 * (5 * 5 + 2 * 2))  # Q Kᵀ, and the probabilities by V, of sequences of 5 and 2 tokens
    assert forward_flops(small, [5, 2], 4) == 2 * weights * 7 + attention + 2 * 4 * 10 * 4
    assert forward_flops(small, [5, 2], 0, rank=3) == 2 * (weights + adapters) * 7 + attention
    assert training_flops(small, [5, 2], 4) == 3 * forward_flops(small, [5, 2], 4)
    with_adapters = (4 * weights + 6 * adapters) * 7 + 3 * attention + 4 * 4 * 10 * 4
    assert training_flops(small, [5, 2], 4, rank=3) == with_adapters


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_gpu_goes_by_its_name(name, peak):
    assert peak_flops(name) == peak


def counted(
    project: Path, models: Path, monkeypatch: pytest.MonkeyPatch, configuration: Configuration, part: str
) -> tuple[int, int]:
    """(FLOPs that torch counts, model FLOPs) of one part of a step.

    Attention is that of plain matrix products, as torch does not count the CPU's fused attention.
    """
    monkeypatch.chdir(project)
    setup = prepare(replace(WORKLOADS["tiny"], precision="fp32"), configuration, models)
    setup = setup._replace(runtime=setup.runtime.model_copy(update={"attention": "eager"}))
    for name, action in PARTS[configuration.stage](setup).items():
        with FlopCounterMode(display=False) as counter:
            cost = action()
        if name == part:
            return counter.get_total_flops(), cost.flops
    raise AssertionError(part)


LENGTHS, NEW = [64] * 4, 8
TOKENS = sum(LENGTHS)
SCALAR_HEAD = 2 * TINY.hidden  # a token
# The gradients of the input of the lowest layer's q, k and v, and of the A of their adapters.
LOWEST = 2 * (64 * 64 + 2 * 64 * 32 + 3 * LORA_RANK * 64) * TOKENS
# Sampling does not feed the last token of a response, and a token attends to those before it alone.
UNSEEN = 2 * TINY.body_weights * 4 + 4 * 2 * 64 * 4 * (64 * 64 - (56 * 56 + sum(range(57, 64))))
# A checkpointed layer runs again up to the last activation that the backward pass needs: without its last product.
LAST_OF_LAYERS = 2 * 2 * 128 * 64 * TOKENS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("configuration", "part", "difference"),
    [
        (Configuration("sft"), "step", 0),
        (Configuration("dpo"), "step", 0),
        (Configuration("rm"), "step", 3 * SCALAR_HEAD * 4),
        (Configuration("ppo"), "update", 3 * SCALAR_HEAD * TOKENS),
        (Configuration("ppo"), "rollouts", forward_flops(TINY, LENGTHS, 4 * NEW) - UNSEEN + SCALAR_HEAD * (TOKENS + 4)),
        (Configuration("sft", lora=True), "step", -LOWEST),
        (Configuration("ppo", lora=True), "update", -2 * LOWEST + 3 * SCALAR_HEAD * TOKENS),
        (Configuration("sft", checkpointing=True), "step", forward_flops(TINY, LENGTHS, 0) - LAST_OF_LAYERS),
    ],
    ids=lambda value: value.name if isinstance(value, Configuration) else None,
)
def test_torch_counts_as_many_but_for_differences_that_have_a_name(
    project, models, monkeypatch, configuration, part, difference
):
    """To the last FLOP: scalar heads, the lowest layer under adapters, sampling's causal mask, what runs again."""
    torch_counts, model_flops = counted(project, models, monkeypatch, configuration, part)
    assert torch_counts - model_flops == difference
    wasted = configuration.checkpointing or part == "rollouts"  # a forward pass is run again, which MFU shall show
    assert torch_counts / model_flops == pytest.approx(1, abs=0.35 if wasted else 0.04)


@pytest.mark.slow
def test_padding_is_no_model_flops(project, models, monkeypatch):
    """Sequences of 8 to 64 tokens, two to a micro-batch, are padded to the longer one; the model FLOPs are theirs."""
    torch_counts, model_flops = counted(project, models, monkeypatch, Configuration("sft", mixed_lengths=True), "step")
    lengths = [8, 26, 45, 64]
    assert model_flops == training_flops(TINY, lengths, sum(lengths) - 4)
    padded = [64, 64, 26, 26]
    assert torch_counts == training_flops(TINY, padded, sum(lengths) - 4)
