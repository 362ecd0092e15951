"""The folders from which an inference engine reads a policy: the whole model, with its head a weight of its own.

Where a model's head is its embedding, an engine that is told to load weights again may load the embedding alone, and go
on with the old head: vLLM 0.32 does, on a CPU. In a folder of the untied model nothing can be left out.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from stages.lib.models.model_facts import read_config
from stages.lib.models.pretrained import DTYPES
from stages.lib.models.tokenizer_files import copy_tokenizer

FILES_OF = "5GB"  # each at most


def write_served_model(weights: dict[str, torch.Tensor], model: Path, out: Path, dtype: str) -> None:
    """Write a model folder of a state dict, tied weights apart; a folder that is there is replaced.

    Args:
        weights: state dict of a plain model, such as masters in float32.
        model: the folder that training started from, whose config and tokenizer it gets.
        dtype: of the saved weights, a name of `DTYPES`.
    """
    from huggingface_hub import save_torch_state_dict

    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    seen: set[int] = set()
    state = {}
    for name, tensor in weights.items():
        own = tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        state[name] = own.clone() if own.data_ptr() in seen else own
        seen.add(own.data_ptr())
    save_torch_state_dict(state, out, max_shard_size=FILES_OF, metadata={"format": "pt"})
    config: dict[str, Any] = read_config(model) | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    if "lm_head.weight" in state:
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_tokenizer(model, out)


def read_served_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, by their names."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
