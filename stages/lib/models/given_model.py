"""A causal language model that was trained elsewhere: fetched, loaded, and refused if it cannot be trained here."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.command.errors import StageError, one_line
from stages.lib.data.chat import require_fast
from stages.lib.models.loading_errors import not_loaded
from stages.lib.models.model_facts import (
    MODEL_JSON,
    TOKENIZER_JSON,
    ModelFacts,
    read_config,
    read_model_facts,
    read_object,
    require_json_objects,
)
from stages.lib.models.weights_files import require_safetensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_CHOICES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"]


def hub_patterns(*, trust_remote_code: bool) -> list[str]:
    """Which files of a Hub model are fetched: code only where it may be run, weights in pickles never."""
    return [*HUB_FILES, *(["*.py"] if trust_remote_code else [])]


def download(model: str, revision: str, *, trust_remote_code: bool) -> Path:
    """Fetch one revision of a Hub model, or find it in the cache. Raises StageError if it cannot be had."""
    from huggingface_hub import snapshot_download

    patterns = hub_patterns(trust_remote_code=trust_remote_code)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of many unrelated types: from the network, the Hub's answers and the disk
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise StageError(
            f"Hub model {model} at revision {revision} cannot be downloaded ({reason}); "
            "check the name, the revision and the network"
        ) from None


def load_pretrained(
    folder: Path, dtype: str, name: str, *, trust_remote_code: bool
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model and its tokenizer; `name` is what a message calls them.

    Raises:
        StageError: a file is missing, cannot be read, or holds other weights than the architecture needs; the model
            brings code of its own and may not run it.
    """
    facts = require_files(folder, name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # missing weights are an error of ours below, not a warning
    logging.disable_progress_bar()
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    # Said here, since config.json may name a kernel of the Hub, which is code. What own code supports nobody knows.
    attention = "sdpa" if "sdpa" in facts.attention_kernels and not trust_remote_code else "eager"
    with not_loaded(f"{name} cannot be loaded as a causal language model"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below by name
            **options,
        )
    faults = sorted({*map(str, report["missing_keys"]), *(key[0] for key in report["mismatched_keys"])})
    if faults:
        raise StageError(f"{name}: {len(faults)} weights are missing or of another shape, the first is {faults[0]}")
    require_known_quantization(model, name)
    require_finite_weights(model, name)
    if tokenizer is None:
        raise StageError(f"{name}: transformers finds no tokenizer in it")
    require_fast(tokenizer, name)
    tell_what_is_not_used(folder, name, sorted(map(str, report["unexpected_keys"])), own_code=trust_remote_code)
    tell_of_another_end(model, tokenizer, name)
    rows = embedding_rows(model)
    if ids_of(tokenizer) > rows:
        raise StageError(f"{name}: the tokenizer has ids up to {ids_of(tokenizer) - 1}, the embedding {rows} rows")
    return model, tokenizer


def require_files(folder: Path, name: str) -> ModelFacts:
    """The facts of a model. Raises StageError unless its folder has the files that are needed, and they make sense."""
    if not folder.is_dir():
        raise StageError(f"{name} is not a model folder: there is no such folder")
    if not (folder / "config.json").is_file():
        raise StageError(f"{name} is not a model folder: config.json is missing")
    require_safetensors(folder, name)
    if not any((folder / choice).is_file() for choice in TOKENIZER_CHOICES):
        raise StageError(f"{name} has no tokenizer: expected {' or '.join(TOKENIZER_CHOICES)}")
    require_json_objects(folder, (*MODEL_JSON, *TOKENIZER_JSON))
    return read_model_facts(read_config(folder), f"{name}: config.json")


def require_known_quantization(model: "PreTrainedModel", name: str) -> None:
    """Raise a StageError for a quantization_config that transformers does not know: it reads the weights as plain."""
    found = getattr(model.config, "quantization_config", None)
    if found and getattr(model, "hf_quantizer", None) is None:
        raise StageError(
            f"{name}: config.json: the installed transformers knows no quantization_config like {found!r:.200}; "
            "remove it if the weights are plain numbers, else use a model that is not quantised"
        )


def tell_what_is_not_used(folder: Path, name: str, weights: list[str], *, own_code: bool) -> None:
    """Warn of weights that the architecture has no place for, and of code that may not be run and need not be."""
    if weights:
        print(
            one_line(
                f"warning: {name}: {len(weights)} of its weights are not read, since the model of its config.json has "
                f"no place for them, the first is {weights[0]}"
            ),
            file=sys.stderr,
        )
    files = (folder / file for file in ("config.json", "tokenizer_config.json"))
    with_code = [file.name for file in files if not own_code and file.is_file() and read_object(file).get("auto_map")]
    if with_code:
        print(
            f"warning: {name}: the Python code that it brings ({', '.join(with_code)}: auto_map) is not run; what "
            "transformers has for models of its type is used; trust_remote_code: true in params.yaml would run it",
            file=sys.stderr,
        )


def tell_of_another_end(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Say that config.json names another EOS than the tokenizer, whose own is the one that is used."""
    ends, end = model.config.eos_token_id, tokenizer.eos_token_id
    if end is not None and ends not in (None, end):
        print(
            f"note: {name}: config.json has {ends!r:.200} as eos_token_id, the tokenizer {end} "
            f"({tokenizer.eos_token}): the tokenizer's is used, unless prepare_base.eos_token names another",
            file=sys.stderr,
        )


def require_finite_weights(model: "PreTrainedModel", name: str) -> None:
    """Raise a StageError that names a weight with a NaN or an infinity: all that is trained from it would be NaN."""
    import torch

    for key, weight in model.named_parameters():
        if weight.numel() and not torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all():
            raise StageError(f"{name}: its weight {key} holds NaN or infinite numbers; use another copy of the model")


def check_forward_pass(model: "PreTrainedModel", name: str) -> None:
    """Raise a StageError unless the log-probs that training computes are those of the model's own logits.

    Some architectures (Granite, Cohere) scale their logits after the head, which `TokenLogProbs` does not; in some
    (PhiMoE) a pass draws random numbers while they train. Where sequences in one row see each other although each has
    positions of its own (OPT, Falcon, GPT-OSS), the model's configuration is told, for `packing`.
    """
    import torch

    from stages.lib.models.model_traits import CAN_BE_PACKED, switch_off_dropout

    kind = model.config.model_type
    if model.config.get_text_config() is not model.config:
        raise StageError(f"{name} cannot be trained here: models of type {kind} hold a language model among others")
    rows = embedding_rows(model)
    ids = torch.arange(min(16, rows))[None]
    first, second = ids.tensor_split(2, dim=1)
    with torch.no_grad():
        with not_loaded(f"{name} cannot be trained here, a trial pass fails ({kind})"):  # no position ids, odd sizes
            logits = model.eval()(input_ids=ids).logits[:, :-1]
            switch_off_dropout(model)
            logps = _logps_of(model, ids)
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

    from stages.lib.models.token_logprobs import TokenLogProbs

    positions = torch.cat([torch.arange(part.shape[1]) for part in sequences])[None]
    return TokenLogProbs(model)(torch.cat(sequences, dim=1), None, positions, positions > 0).logps


def embedding_rows(model: "PreTrainedModel") -> int:
    return next(model.get_input_embeddings().parameters()).shape[0]


def ids_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The number of rows that the tokenizer's ids need; more than its tokens if there are gaps between the ids."""
    return max(tokenizer.get_vocab().values()) + 1
