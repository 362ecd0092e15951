"""The files of weights in a model folder: safetensors alone are read, since a pickle can run code as it is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.command.errors import StageError
from stages.lib.models.loading_errors import not_loaded
from stages.lib.models.model_facts import read_config, read_object

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")
ADAPTER = "adapter_config.json"


def require_safetensors(folder: Path, name: str) -> None:
    """Raise a StageError, which calls the model `name`, unless its weights are whole and in safetensors files."""
    if (folder / ADAPTER).exists():  # transformers would look for another model, named in that file, and load it
        raise StageError(
            f"{name} holds an adapter ({ADAPTER}), not a whole model: merge it into its base with PEFT's "
            "merge_and_unload() and save_pretrained(), or remove that file if the weights beside it are whole"
        )
    if read_config(folder).get("transformers_weights") is not None:  # a file of any name, that nothing here looks at
        raise StageError(f"{name}: config.json names weights in 'transformers_weights': rename the file to {WEIGHTS}")
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        _require_shards(folder, name)
        return
    if (folder / WEIGHTS).is_file():
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise StageError(
            f"{name} has its weights as a pickle alone ({pickles[0]}), which is not read, since one can run code as it "
            "is loaded; convert it where you trust it: `from transformers import AutoModelForCausalLM as M; "
            "M.from_pretrained(FOLDER).save_pretrained(FOLDER)` writes model.safetensors; for a Hub model, "
            "huggingface.co/spaces/safetensors/convert opens a pull request, whose commit can be "
            "prepare_base.hub_revision"
        )
    raise StageError(f"{name} has no weights: expected {WEIGHTS} or {INDEX}")


def _require_shards(folder: Path, name: str) -> None:
    """Raise a StageError unless each file that the index names is a safetensors file of the folder."""
    for shard in shards_in_index(folder, name):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise StageError(f"{name}: {INDEX} names {shard!r}: expected a .safetensors file of the same folder")
        if not (folder / shard).is_file():
            raise StageError(f"{name}: {INDEX} names {shard}, which is missing")


def shards_in_index(folder: Path, name: str) -> list[str]:
    """The files that the index names. Raises a StageError if it names none."""
    shards = read_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise StageError(f"{name}: {INDEX}: expected 'weight_map' with the file of each weight")
    return sorted(set(shards.values()))


def weights_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model folder, which has been through `require_safetensors`."""
    whole = folder / WEIGHTS
    return [whole] if whole.is_file() else [folder / shard for shard in shards_in_index(folder, name)]


def read_tensor(folder: Path, tensor: str) -> "torch.Tensor | None":
    """One tensor of a model folder, on the CPU; None if it has none of that name."""
    from safetensors import safe_open

    for path in weights_files(folder, str(folder)):
        with not_loaded(f"{path} cannot be read"), safe_open(path, framework="pt") as file:
            if tensor in file.keys():  # noqa: SIM118 (not a dict)
                return file.get_tensor(tensor)
    return None
