"""What is measured: sizes of model and step, and the configurations of a stage."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.model_flops import Architecture

STAGES = ("sft", "rm", "dpo", "ppo")
LORA_RANK = 16
# Qwen2.5-1.5B as in its config.json (huggingface.co/Qwen/Qwen2.5-1.5B): 1.54 billion parameters, embeddings tied.
ARCHITECTURES = {
    "qwen2.5-1.5b": Architecture(
        layers=28, hidden=1536, heads=12, key_value_heads=2, intermediate=8960, vocabulary=151936
    ),
    "tiny": Architecture(layers=2, hidden=64, heads=4, key_value_heads=2, intermediate=128, vocabulary=512),
}


@dataclass(frozen=True)
class Workload:
    """One optimizer step (of PPO: one phase of rollouts and its update), and how many are timed."""

    size: str  # a key of ARCHITECTURES
    precision: Literal["bf16", "fp32"]
    sequence_length: int  # tokens; of the longest sequence where lengths are mixed
    sequences: int  # in a step; a pair is two
    new_tokens: int  # of a PPO rollout, part of its sequence_length
    micro_batch_tokens: int
    warm_up_steps: int  # not timed
    timed_steps: int

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.size]


# A PPO phase takes many times as long as a step of the others, so fewer are timed.
WORKLOADS = {
    "qwen2.5-1.5b": Workload("qwen2.5-1.5b", "bf16", 2048, 16, 256, 8192, 2, 5),
    "tiny": Workload("tiny", "bf16", 64, 4, 8, 128, 1, 2),
}
PPO_STEPS = {"warm_up_steps": 1, "timed_steps": 2}


@dataclass(frozen=True)
class Configuration:
    """One row of the table: a stage, and the knobs of `runtime.yaml` and `params.yaml` that are compared."""

    stage: str
    lora: bool = False
    checkpointing: bool = False
    offload: bool = False  # of activations
    mixed_lengths: bool = False
    packing: bool = False
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"

    @property
    def name(self) -> str:
        """The stage and what is switched on, as `--only` takes it."""
        switches = {
            "lora": self.lora,
            "checkpointing": self.checkpointing,
            "offload": self.offload,
            "mixed": self.mixed_lengths,
            "packing": self.packing,
            "flash": self.attention == "flash_attention_2",
        }
        return "+".join([self.stage, *(name for name, on in switches.items() if on)])


def all_configurations() -> list[Configuration]:
    """Every stage with and without LoRA and checkpointing, then the rest; the last ones suffer when time runs out."""
    grid = [
        Configuration(stage, lora=lora, checkpointing=checkpointing)
        for lora, checkpointing in ((False, False), (False, True), (True, False), (True, True))
        for stage in STAGES
    ]
    flash = Configuration("sft", attention="flash_attention_2")
    mixed = [
        Configuration("sft", mixed_lengths=True, packing=packing, attention=attention)
        for packing, attention in ((False, "sdpa"), (True, "sdpa"), (True, "flash_attention_2"))
    ]
    return [*grid, flash, *mixed, Configuration("sft", offload=True)]
