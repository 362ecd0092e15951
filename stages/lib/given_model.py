"""A causal language model that was trained elsewhere: fetched, loaded, and refused if it cannot be trained here."""

from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.errors import StageError

if TYPE_CHECKING:
    import torch
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


def check_forward_pass(model: "PreTrainedModel", name: str) -> None:
    """Raise a StageError unless the log-probs that training computes are those of the model's own logits.

    Some architectures (Granite, Cohere) scale their logits after the head, which `TokenLogProbs` does not; in some
    (PhiMoE) a pass draws random numbers while they train. Where sequences in one row see each other although each has
    positions of its own (OPT, Falcon, GPT-OSS), the model's configuration is told, for `packing`.
    """
    import torch

    from stages.lib.model_traits import CAN_BE_PACKED, switch_off_dropout

    kind = model.config.model_type
    if model.config.get_text_config() is not model.config:
        raise StageError(f"{name} cannot be trained here: models of type {kind} hold a language model among others")
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(min(16, rows))[None]
    first, second = ids.tensor_split(2, dim=1)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[:, :-1]
        switch_off_dropout(model)
        try:
            logps = _logps_of(model, ids)
        except (AttributeError, TypeError) as error:  # an architecture without position ids, say
            raise StageError(f"{name} cannot be trained here ({kind}): {error}") from None
        training = [_logps_of(model.train(), ids) for _ in range(2)]
        model.eval()
        after_others = [_logps_of(model, other, second)[:, first.shape[1] :] for other in (first, first.flip(1))]
    expected = logits.float().log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    rounding = torch.finfo(logits.dtype).eps * float(logits.abs().max())

    def differ(ours: torch.Tensor, theirs: torch.Tensor, roundings: int = 8) -> bool:
        return not float((ours - theirs).abs().max()) <= 1e-5 + roundings * rounding

    if differ(logps[:, 1:], expected):
        raise StageError(
            f"{name} cannot be trained here: models of type {kind} compute their logits in a way "
            "of their own, for instance scaled after the head, or by experts that are drawn"
        )
    if any(differ(logps, again) for again in training):
        raise StageError(
            f"{name} cannot be trained here: models of type {kind} compute something else while they are trained, "
            "for instance with random numbers; if its config.json has a dropout, set it to 0"
        )
    if differ(*after_others, roundings=1):  # passes of one shape
        setattr(model.config, CAN_BE_PACKED, False)


def _logps_of(model: "PreTrainedModel", *sequences: "torch.Tensor") -> "torch.Tensor":
    """Log-probs of the tokens of one or more sequences in one row. Shape: (1, sum of lengths), 0 where one begins."""
    import torch

    from stages.lib.token_logprobs import TokenLogProbs

    positions = torch.cat([torch.arange(part.shape[1]) for part in sequences])[None]
    return TokenLogProbs(model)(torch.cat(sequences, dim=1), None, positions, positions > 0)[0]


def ids_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The number of rows that the tokenizer's ids need; more than its tokens if there are gaps between the ids."""
    return max(tokenizer.get_vocab().values()) + 1
