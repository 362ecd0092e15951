"""Hugging Face model folders: loading them, and writing them so that any other program loads them as they are."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from stages.lib.errors import StageError
from stages.lib.model_traits import CAN_BE_PACKED, switch_off_dropout
from stages.lib.quantization import is_quantized, nf4_options, settle_quantized_layers, whole_twin
from stages.lib.settings.lora import BaseQuantization
from stages.lib.settings.runtime import Runtime

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}

NOTHING_MISSING: dict[str, tuple] = {"missing_keys": (), "mismatched_keys": ()}


def load_language_model(
    path: Path,
    precision: str,
    runtime: Runtime,
    device: torch.device,
    quantization: BaseQuantization = None,
    *,
    frozen: bool = False,
) -> nn.Module:
    """Load a causal language model, without dropout. Raises StageError if `path` is no such model.

    Where ZeRO 3 will shard it, it stays in the CPU's memory, and only the first process reads its weights.

    Args:
        quantization: of the linear layers of the body, which then cannot be trained.
        frozen: no engine will train it, so `frozen_zero_stage` says whether it will be sharded, not `zero_stage`.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, path, precision, runtime, device, quantization, frozen)


def load_classifier(
    path: Path,
    precision: str,
    runtime: Runtime,
    device: torch.device,
    quantization: BaseQuantization = None,
    *,
    frozen: bool = False,
) -> nn.Module:
    """Load a model with a scalar head named `score`, as `train_rm` writes it. Raises StageError if there is none."""
    from transformers import AutoModelForSequenceClassification

    if not any("SequenceClassification" in name for name in read_config(path).get("architectures") or []):
        raise StageError(f"{path} is no reward model: its config.json names no sequence classifier")
    where = (path, precision, runtime, device, quantization, frozen)
    model = _load(AutoModelForSequenceClassification, *where, num_labels=1)
    return require_scalar_head(model, path)


def new_classifier(
    path: Path,
    precision: str,
    runtime: Runtime,
    device: torch.device,
    seed: int,
    quantization: BaseQuantization = None,
) -> nn.Module:
    """A classifier on the body of the language model at `path`, its head drawn from N(0, 1/(d+1)²) with `seed`.

    The head is that of OpenAI's "Learning to summarize" (arXiv 2009.01325): bias-free, standard deviation 1/(d+1).
    """
    from transformers import AutoModelForSequenceClassification

    head_alone = frozenset({"score.weight"})
    where = (path, precision, runtime, device, quantization, False)
    model = _load(AutoModelForSequenceClassification, *where, head_alone, num_labels=1)
    require_scalar_head(model, path)
    width = model.score.weight.shape[1]
    head = torch.empty((1, width), dtype=torch.float32)
    head.normal_(std=1 / (width + 1), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.score.weight.copy_(head)
    return model


def require_scalar_head(model: nn.Module, path: Path) -> nn.Module:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise StageError(
            f"{path}: {type(model).__name__} has no bias-free scalar head named 'score'; "
            "use a decoder architecture such as Llama, Qwen2, Mistral or GPT-2"
        )
    return model


def _load(
    auto_class: Any,
    path: Path,
    precision: str,
    runtime: Runtime,
    device: torch.device,
    quantization: BaseQuantization,
    frozen: bool,
    may_be_missing: frozenset[str] = frozenset(),
    **overrides: Any,
) -> nn.Module:
    config = read_config(path)
    if runtime.packing and not config.get(CAN_BE_PACKED, True):
        raise StageError(
            f"runtime.yaml: packing: in models of type {config.get('model_type')}, as {path} is, sequences of one row "
            "would see each other; set packing: false"
        )
    _quiet_loading()
    require_attention_kernel(runtime, precision)
    sharded = not quantization and (runtime.frozen_zero_stage if frozen else runtime.zero_stage) == 3
    if quantization == "nf4":
        overrides |= nf4_options(DTYPES[precision], device)
    overrides |= {"dtype": DTYPES[precision], "attn_implementation": runtime.attention, "local_files_only": True}
    try:
        if sharded and dist.is_initialized() and dist.get_rank() > 0:
            model, report = _without_weights(auto_class, path, **overrides), NOTHING_MISSING
        else:
            model, report = auto_class.from_pretrained(path, output_loading_info=True, **overrides)
    except ImportError as error:
        raise StageError(f"runtime.yaml: attention: {runtime.attention} cannot be used here: {error}") from None
    except Exception as error:  # safetensors and torch raise types of their own for malformed files
        reason = " ".join(str(error).split())
        raise StageError(f"{path} cannot be loaded as {auto_class.__name__}: {reason}") from None
    missing = {*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])} - may_be_missing
    if missing:
        raise StageError(f"{path} lacks {len(missing)} weights, the first is {min(missing)}")
    switch_off_dropout(model)
    settle_quantized_layers(model)
    if runtime.gradient_checkpointing and not frozen:  # it would ask for gradients in a model that has none
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model if quantization or sharded else model.to(device)


def _without_weights(auto_class: Any, path: Path, *, num_labels: int | None = None, **options: Any) -> nn.Module:
    """The model of a folder with weights that nobody has written to, so that they take no memory yet.

    For a process that gets its shards from the first one (DeepSpeed hands them out weight by weight).
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    labels = {} if num_labels is None else {"num_labels": num_labels}
    config = AutoConfig.from_pretrained(path, local_files_only=options.pop("local_files_only"), **labels)
    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(config, **options)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(weight, device="cpu")))
    model.tie_weights()
    return model


def require_attention_kernel(runtime: Runtime, precision: str) -> None:
    """Raise StageError for flash attention on a CPU or in float32, which its kernels do not compute."""
    if runtime.attention == "flash_attention_2" and runtime.device == "cpu":
        raise StageError("runtime.yaml: attention: flash_attention_2 needs a GPU; set device: cuda, or attention: sdpa")
    if runtime.attention == "flash_attention_2" and DTYPES[precision] not in (torch.bfloat16, torch.float16):
        raise StageError(
            f"runtime.yaml: attention: flash_attention_2 computes in bf16, not in {precision}; set the stage's "
            "precision in params.yaml to bf16, or attention to sdpa"
        )


def _quiet_loading() -> None:
    """A new score head is drawn by us, so transformers' report on missing and unused weights would only alarm."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    # PEFT imports it wherever it is installed, and it then asks for a package that speeds up what is not used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises StageError if `path` is no model folder."""
    file = path / "config.json"
    if not file.is_file():
        raise StageError(f"{path} is no model folder: {file} is missing")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StageError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from None


def save_model(
    model: nn.Module, weights: dict[str, torch.Tensor], out: Path, *, save_dtype: str, tokenizer_from: Path
) -> None:
    """Write a model folder: `weights` cast to `save_dtype`, config, generation config, and the tokenizer's files.

    Args:
        weights: state dict of `model`, for instance the float32 masters of a bf16 model; if it is quantised or has
            adapters, the state dict of the plain model that computes the same.
    """
    from stages.lib.tokenizer_files import copy_tokenizer

    dtype = DTYPES[save_dtype]
    if is_quantized(model):
        model = whole_twin(model)
    # Tied weights are one tensor under two names, and must stay one to be saved once.
    cast = {tensor.data_ptr(): tensor.detach().to("cpu", dtype) for tensor in weights.values()}
    model.save_pretrained(out, state_dict={name: cast[tensor.data_ptr()] for name, tensor in weights.items()})
    config_file = out / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = save_dtype
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer_from, out)


def end_and_pad_ids(path: Path) -> tuple[int, int]:
    """(EOS id, pad id) of a model folder. Raises StageError unless both are set and differ."""
    config = read_config(path)
    eos_id, pad_id = config.get("eos_token_id"), config.get("pad_token_id")
    if not isinstance(eos_id, int) or not isinstance(pad_id, int) or eos_id == pad_id:
        raise StageError(
            f"{path}/config.json: expected one eos_token_id and another pad_token_id, found {eos_id} and {pad_id}; "
            "prepare_base writes them so"
        )
    return eos_id, pad_id
