"""A causal language model that was trained elsewhere: fetched, loaded, and refused if it cannot be trained here."""

from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_FILES = {
    "config.json": ("config.json",),
    "weights": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
}
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"]


def download(model: str, revision: str) -> Path:
    """Fetch one revision of a Hub model, or find it in the cache. Raises StageError if it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # of many unrelated types: from the network, the Hub's answers and the disk
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise StageError(
            f"Hub model {model} at revision {revision} cannot be downloaded ({reason}); "
            "check the name, the revision and the network"
        ) from None


def load_pretrained(folder: Path, dtype: str, name: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model and its tokenizer; `name` is what a message calls them.

    Raises:
        StageError: a file is missing, cannot be read, or holds other weights than the architecture needs.
    """
    for what, choices in MODEL_FILES.items():
        if not any((folder / choice).is_file() for choice in choices):
            raise StageError(f"{name} is no model directory: {what} missing (expected {' or '.join(choices)})")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # missing weights are an error of ours below, not a warning
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors, tokenizers and torch raise types of their own for malformed files
        raise StageError(
            f"{name} cannot be loaded as a causal language model: {' '.join(str(error).split())}"
        ) from None
    faults = [*sorted(map(str, report["missing_keys"])), *sorted(map(str, report["mismatched_keys"]))]
    if faults:
        raise StageError(f"{name}: {len(faults)} weights are missing or of another shape, the first is {faults[0]}")
    rows = model.get_input_embeddings().weight.shape[0]
    if ids_of(tokenizer) > rows:
        raise StageError(f"{name}: the tokenizer has ids up to {ids_of(tokenizer) - 1}, the embedding {rows} rows")
    return model, tokenizer


def check_logits(model: "PreTrainedModel", name: str) -> None:
    """Raise a StageError unless the log-probs that training computes are those of the model's own logits.

    Some architectures (Granite, Cohere) scale their logits after the head, which `TokenLogProbs` does not.
    """
    import torch

    from stages.lib.token_logprobs import TokenLogProbs

    ids = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]))[None]
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    with torch.no_grad():
        try:
            logps, _ = TokenLogProbs(model)(ids, None, torch.arange(ids.shape[1])[None], targets)
        except (AttributeError, TypeError) as error:  # an architecture without position ids, say
            raise StageError(f"{name} cannot be trained here ({model.config.model_type}): {error}") from None
        logits = model(input_ids=ids).logits[:, :-1]
        expected = logits.float().log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    rounding = 1e-5 + 8 * torch.finfo(logits.dtype).eps * float(logits.abs().max())
    if not float((logps[:, 1:] - expected).abs().max()) <= rounding:
        raise StageError(
            f"{name} cannot be trained here: models of type {model.config.model_type} compute their logits in a way "
            "of their own, for instance scaled after the head"
        )


def ids_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The number of rows that the tokenizer's ids need; more than its tokens if there are gaps between the ids."""
    return max(tokenizer.get_vocab().values()) + 1
