"""What is timed beside TRL, and the model and rows that both are given.

The model is a Llama with random weights, the tokens are those of a byte-level BPE that is trained on the pairs, so
nothing is downloaded. Both programs get the same ids, in the same order.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.model_flops import Architecture
from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.data.conversations import Message
from stages.lib.settings.declaration import block
from stages.lib.settings.sources import FileSource
from stages.read_source import Reading

END, PAD = "<end>", "<pad>"
LLAMA = Architecture(layers=4, hidden=256, heads=4, key_value_heads=4, intermediate=768, vocabulary=2048)
Task = Literal["sft", "rm", "dpo", "dpo-live", "reference"]


@dataclass(frozen=True)
class Job:
    """One thing to time: a task at a number of rows (or pairs) in a step."""

    task: Task  # dpo: against a precomputed reference; dpo-live: its time is in the step; reference: its log-probs
    rows: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.rows}"


JOBS = (Job("sft", 8), Job("sft", 32), Job("rm", 8), Job("rm", 32), Job("dpo", 8), Job("dpo", 32), Job("dpo-live", 8))
JOBS += (Job("reference", 8),)


@dataclass(frozen=True)
class Order:
    """All that a program must know to time a job."""

    task: Task
    rows: int
    warm_up_steps: int
    timed_steps: int
    threads: int
    learning_rate: float
    beta: float
    models: str  # folder of policy/ and reward/
    pairs: str  # JSON lines of prompt_ids, chosen_ids and rejected_ids
    out: str  # JSON: seconds and processor seconds of each timed step, losses and gradient norms of all, memory

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def texts_of(path: Path) -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected reply of each pair of a file, in any format of pairs that the pipeline reads."""
    settings = build(FileSource, block(FileSource, path=str(path), kinds=["preference"], on_unusable_row="drop"), "")
    rows = [row for row in Reading(settings, str(path)).rows() if row["kind"] == "preference"]
    if not rows:
        raise StageError(f"{path}: no pair was found in it")
    return [
        (f"{as_text(row['prompt'])}\n\nAssistant:", *(f" {row[side][0]['content']}" for side in ("chosen", "rejected")))
        for row in rows
    ]


def as_text(messages: list[Message]) -> str:
    return "".join(f"\n\n{message['role'].capitalize()}: {message['content']}" for message in messages)


def encoded(texts: list[tuple[str, str, str]], longest: int) -> Iterator[dict[str, list[int]]]:
    """The pairs whose sequences have at most `longest` tokens, as ids; each reply ends with END."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=LLAMA.vocabulary, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for pair in texts for text in pair), trainer)
    for pair in texts:
        prompt, chosen, rejected = (tokenizer.encode(text).ids for text in pair)
        if len(prompt) + max(len(chosen), len(rejected)) < longest:
            yield {"prompt_ids": prompt, "chosen_ids": [*chosen, 0], "rejected_ids": [*rejected, 0]}


def write_models(folder: Path) -> None:
    """FOLDER/policy, a causal language model, and FOLDER/reward, a classifier on a body of its own."""
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    config = LlamaConfig(
        vocab_size=LLAMA.vocabulary,
        hidden_size=LLAMA.hidden,
        intermediate_size=LLAMA.intermediate,
        num_hidden_layers=LLAMA.layers,
        num_attention_heads=LLAMA.heads,
        num_key_value_heads=LLAMA.key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    # TRL asks for a tokenizer, of which it reads the end and the padding alone: what it is given are ids.
    named = Tokenizer(models.WordLevel({END: 0, PAD: 1}, unk_token=PAD))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=named, eos_token=END, pad_token=PAD)
    torch.manual_seed(0)
    for kind, name in ((AutoModelForCausalLM, "policy"), (AutoModelForSequenceClassification, "reward")):
        model: Any = kind.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
