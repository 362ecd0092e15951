"""Model folders with random weights, made from a configuration alone: no network, no download.

python -m benchmarks.random_models SIZE PRECISION FOLDER
"""

import sys
from pathlib import Path

import torch

from benchmarks.workloads import ARCHITECTURES
from stages.lib.models.pretrained import DTYPES
from stages.lib.models.tokenizer_files import TOKENIZER_FILES


def main(size: str, precision: str, folder: str) -> None:
    """Write FOLDER/policy, a causal language model, and FOLDER/reward, a classifier with a scalar head."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config

    architecture = ARCHITECTURES[size]
    config = Qwen2Config(
        vocab_size=architecture.vocabulary,
        hidden_size=architecture.hidden,
        intermediate_size=architecture.intermediate,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.key_value_heads,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        num_labels=1,
        eos_token_id=architecture.vocabulary - 2,
        pad_token_id=architecture.vocabulary - 1,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for kind, name in ((AutoModelForCausalLM, "policy"), (AutoModelForSequenceClassification, "reward")):
        with torch.device(device):
            model = kind.from_config(config, dtype=DTYPES[precision])
        model.save_pretrained(Path(folder) / name)
        for file in TOKENIZER_FILES:  # never read, as there is no text: equal, they say that ids mean the same to both
            (Path(folder) / name / file).write_text("{}")


if __name__ == "__main__":
    main(*sys.argv[1:])
