"""Hugging Face model folders: loading them, and writing them so that any other program loads them as they are."""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from stages.lib.command.errors import StageError
from stages.lib.models.loading_errors import not_loaded
from stages.lib.models.model_facts import MODEL_JSON, ModelFacts, read_config, read_model_facts, require_json_objects
from stages.lib.models.model_traits import CAN_BE_PACKED, switch_off_dropout
from stages.lib.models.quantization import is_quantized, nf4_options, settle_quantized_layers, whole_twin
from stages.lib.models.spared_imports import spared
from stages.lib.models.weights_files import require_safetensors
from stages.lib.settings.lora import BaseQuantization
from stages.lib.settings.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}

NOTHING_MISSING: dict[str, tuple] = {"missing_keys": (), "mismatched_keys": (), "unexpected_keys": ()}


@dataclass(frozen=True)
class Loading:
    """Where and how a stage loads a model.

    Args:
        precision: of weights and activations, fp32 or bf16.
        quantization: of the linear layers of the body, which then cannot be trained.
        frozen: no engine will train it, so `frozen_zero_stage` says whether it will be sharded, not `zero_stage`.
        trust_remote_code: Python code that the model brings may be run.
    """

    precision: str
    runtime: Runtime
    device: torch.device
    quantization: BaseQuantization = None
    frozen: bool = False
    trust_remote_code: bool = False


def load_language_model(path: Path, loading: Loading) -> "PreTrainedModel":
    """Load a causal language model, without dropout. Raises StageError if `path` is no such model.

    Where ZeRO 3 will shard it, it stays in the CPU's memory, and only the first process reads its weights.
    """
    from transformers import AutoModelForCausalLM

    return load_as(AutoModelForCausalLM, path, loading)


def load_classifier(path: Path, loading: Loading) -> "PreTrainedModel":
    """Load a model with a scalar head named `score`, as `train_rm` writes it. Raises StageError if there is none."""
    from transformers import AutoModelForSequenceClassification

    if "SequenceClassification" not in str(read_config(path).get("architectures")):
        raise StageError(f"{path} is not a reward model: its config.json names no sequence classifier")
    model = load_as(AutoModelForSequenceClassification, path, loading, num_labels=1)
    scalar_head(model, path)
    return model


def new_classifier(path: Path, loading: Loading, seed: int) -> "PreTrainedModel":
    """A classifier on the body of the language model at `path`, its head drawn from N(0, 1/(d+1)²) with `seed`.

    The head is that of OpenAI's "Learning to summarize" (arXiv 2009.01325): bias-free, standard deviation 1/(d+1).
    """
    from transformers import AutoModelForSequenceClassification

    facts = read_model_facts(read_config(path), f"{path}/config.json")
    if not facts.has_classifier:
        raise StageError(
            f"{path}: transformers has no sequence classifier for models of type {facts.model_type}, so no reward "
            "model can be made of it; SFT and DPO work; use another architecture for RL, such as Llama, Qwen2 or GPT-2"
        )
    model = load_as(
        AutoModelForSequenceClassification,
        path,
        loading,
        may_be_missing=frozenset({"score.weight"}),
        unread=lambda _names, _path: None,  # the language model's head, in place of the new one
        num_labels=1,
    )
    weight = scalar_head(model, path).weight
    width = weight.shape[1]
    head = torch.empty((1, width), dtype=torch.float32)
    head.normal_(std=1 / (width + 1), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight.copy_(head)
    return model


def scalar_head(model: nn.Module, path: Path) -> nn.Linear:
    """The head of a classifier with one output. Raises StageError if it is not as `Scores` needs it."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise StageError(
            f"{path}: {type(model).__name__} has no bias-free scalar head named 'score'; "
            "use a decoder architecture such as Llama, Qwen2, Mistral or GPT-2"
        )
    return head


def refuse_unread_weights(names: Iterable[str], path: Path) -> None:
    """Raise StageError if a folder that a stage wrote holds weights for which its config.json has no place."""
    unread = sorted(map(str, names))
    if unread:
        raise StageError(
            f"{path} holds {len(unread)} weights for which the model of its config.json has no place, the first is "
            f"{unread[0]}: the two do not belong together; make the folder again"
        )


def load_as(
    auto_class: Any,
    path: Path,
    loading: Loading,
    *,
    may_be_missing: frozenset[str] = frozenset(),
    unread: Callable[[Iterable[str], Path], None] = refuse_unread_weights,
    **overrides: Any,
) -> "PreTrainedModel":
    """Load a model folder as one of transformers' automatic classes, without dropout.

    Args:
        may_be_missing: weights that the caller will write.
        unread: is told of weights for which the class has no place.
        overrides: of the model's configuration.
    Raises:
        StageError: it cannot be loaded so, or weights are missing, or runtime.yaml asks for what it cannot do.
    """
    runtime, precision, frozen = loading.runtime, loading.precision, loading.frozen
    config = read_config(path)
    require_json_objects(path, MODEL_JSON)
    if runtime.packing and not config.get(CAN_BE_PACKED, True):
        raise StageError(
            f"runtime.yaml: packing: in models of type {config.get('model_type')}, as {path} is, sequences of one row "
            "would see each other; set packing: false"
        )
    _quiet_loading()
    require_attention_kernel(runtime, precision)
    require_flash_package(runtime)
    require_kernel_of(read_model_facts(config, f"{path}/config.json"), runtime, path)
    require_safetensors(path, str(path))
    sharded = not loading.quantization and (runtime.frozen_zero_stage if frozen else runtime.zero_stage) == 3
    if loading.quantization == "nf4":
        overrides |= nf4_options(DTYPES[precision], loading.device)
    overrides |= {"dtype": DTYPES[precision], "attn_implementation": runtime.attention, "local_files_only": True}
    overrides |= {"trust_remote_code": loading.trust_remote_code}
    with not_loaded(f"{path} cannot be loaded as {auto_class.__name__}"):
        try:
            if sharded and dist.is_initialized() and dist.get_rank() > 0:
                model, report = _without_weights(auto_class, path, **overrides), NOTHING_MISSING
            else:
                # Weights of another shape are told below by name, where transformers would not name them.
                options = {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
                model, report = auto_class.from_pretrained(path, **options, **overrides)
        except ImportError as error:
            if not runtime.attention.startswith("flash"):
                raise
            raise StageError(f"runtime.yaml: attention: {runtime.attention} cannot be used here: {error}") from None
    missing = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])} - may_be_missing
    if missing:
        raise StageError(
            f"{path}: {len(missing)} weights are missing or of another shape than config.json says, the first is "
            f"{min(missing)}"
        )
    unread(report["unexpected_keys"], path)
    switch_off_dropout(model)
    settle_quantized_layers(model)
    if runtime.gradient_checkpointing and not frozen:  # it would ask for gradients in a model that has none
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model if loading.quantization or sharded else model.to(loading.device)


def _without_weights(auto_class: Any, path: Path, *, num_labels: int | None = None, **options: Any) -> Any:
    """The model of a folder with weights that nobody has written to, so that they take no memory yet.

    For a process that gets its shards from the first one (DeepSpeed hands them out weight by weight).
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    labels = {} if num_labels is None else {"num_labels": num_labels}
    labels["trust_remote_code"] = options.get("trust_remote_code", False)
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


def require_flash_package(runtime: Runtime) -> None:
    """Raise StageError for flash attention without its package: transformers may then fetch a kernel from the Hub."""
    if runtime.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise StageError(
            "runtime.yaml: attention: flash_attention_2 cannot be used here: the package flash-attn is not installed; "
            "install it, or set attention: sdpa"
        )


def require_kernel_of(facts: ModelFacts, runtime: Runtime, path: Path) -> None:
    """Raise StageError for an attention kernel that an architecture does not compute with."""
    if runtime.attention not in facts.attention_kernels:
        usable = " or ".join(sorted(facts.attention_kernels))
        raise StageError(
            f"runtime.yaml: attention: models of type {facts.model_type}, as {path} is, do not compute with "
            f"{runtime.attention}; set attention: {usable}"
        )


def _quiet_loading() -> None:
    """A new score head is drawn by us, so transformers' report on missing and unused weights would only alarm."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    # PEFT imports it wherever it is installed, and it then asks for a package that speeds up what is not used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def facts_of(model: "PreTrainedModel") -> ModelFacts:
    """What the config of a loaded model says of it."""
    return read_model_facts(model.config.to_dict())


def save_model(
    model: "PreTrainedModel", weights: dict[str, torch.Tensor], out: Path, *, save_dtype: str, tokenizer_from: Path
) -> None:
    """Write a model folder: `weights` cast to `save_dtype`, config, generation config, and the tokenizer's files.

    Args:
        weights: state dict of `model`, for instance the float32 masters of a bf16 model; if it is quantised or has
            adapters, the state dict of the plain model that computes the same.
    """
    from stages.lib.models.tokenizer_files import copy_tokenizer

    dtype = DTYPES[save_dtype]
    if is_quantized(model):
        model = whole_twin(model)
    # Tied weights are one tensor under two names, and must stay one to be saved once.
    cast = {tensor.data_ptr(): tensor.detach().to("cpu", dtype) for tensor in weights.values()}
    with spared("deepspeed"):
        model.save_pretrained(out, state_dict={name: cast[tensor.data_ptr()] for name, tensor in weights.items()})
    config_file = out / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = save_dtype
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer_from, out)


def end_and_pad_ids(path: Path) -> tuple[int, int]:
    """(EOS id, pad id) of a model folder. Raises StageError unless both are ids of its vocabulary and differ."""
    config = read_config(path)
    eos_id, pad_id = config.get("eos_token_id"), config.get("pad_token_id")
    ids = range(read_model_facts(config, f"{path}/config.json").vocab_size or 0)
    if type(eos_id) is not int or type(pad_id) is not int or eos_id == pad_id or eos_id not in ids or pad_id not in ids:
        raise StageError(
            f"{path}/config.json: expected one eos_token_id and another pad_token_id, found {eos_id} and {pad_id}; "
            "prepare_base writes them so"
        )
    return eos_id, pad_id
