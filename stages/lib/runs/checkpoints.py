"""A checkpoint on disk: a folder of JSON and safetensors with a manifest of their checksums. It holds no pickle.

checkpoint-00000040/
    state.json                  what is small: numbers, text, and lists and mappings of them
    tensors-00000.safetensors   what is large, in as many files as it takes
    manifest.json               the step, and the SHA-256 of each of the others
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize_tensors

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import file_hash

FILE_BYTES = 2**30  # tensors of a checkpoint that are gathered before they are written
STATE, MANIFEST = "state.json", "manifest.json"
PICKLE = "state.pt"  # where earlier code kept the state
_NAME = re.compile(r"checkpoint-\d{8,}")
_PLAIN = (bool, int, float, str, type(None))


class Checkpoint:
    """A checkpoint that is whole: its small state, and its tensors, each read when asked for."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder = folder
        self.state = state
        files = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)

    def read(self, name: str) -> torch.Tensor:
        """The tensor that was saved under `name`, on the CPU. Raises StageError if there was none."""
        if name not in self._file_of:
            raise StageError(
                f"{self.folder} is of code that saved other tensors (it lacks {name}); "
                "set runtime.yaml: resume_across_code_change: false"
            )
        return self._file_of[name].get_tensor(name)


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step:08d}"


def checkpoints_in(state: Path) -> list[Path]:
    """What has the name of a checkpoint, in the order of the steps."""
    return sorted(path for path in state.glob("checkpoint-*") if _NAME.fullmatch(path.name))


def is_pickled(checkpoint: Path) -> bool:
    """Whether earlier code kept its state there as a pickle, which nothing here loads."""
    return (checkpoint / PICKLE).exists()


def write_checkpoint(
    folder: Path, step: int, state: dict[str, Any], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write a checkpoint's files into an empty folder, and sync them to disk.

    Raises:
        TypeError: something in `state` is no plain value.
        OSError: the disk is full or not writable.
    """
    hashes = {STATE: write_synced(folder / STATE, exact_json(state))}
    for place, content in enumerate(_files_of(tensors)):
        name = f"tensors-{place:05d}.safetensors"
        hashes[name] = write_synced(folder / name, content)
    write_synced(folder / MANIFEST, json.dumps({"step": step, "sha256": hashes}).encode())
    sync(folder)


def open_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None if it is not whole: other files than its manifest names, or other content.

    Raises:
        StageError: a file is there and cannot be read, as on a file system that is gone for a while.
    """
    try:
        if folder.is_symlink() or not _has_the_files_of_its_manifest(folder):
            return None
        state = read_json_or_none(folder / STATE)
        return Checkpoint(folder, state) if _is_state(state, folder.name) else None
    except (FileNotFoundError, NotADirectoryError, SafetensorError):
        return None
    except OSError as error:
        raise StageError(
            f"{folder} cannot be read: {error.filename}: {error.strerror}; nothing was changed, so start again "
            "once it can be"
        ) from None


def _has_the_files_of_its_manifest(folder: Path) -> bool:
    entries = list(folder.iterdir())
    if any(entry.is_symlink() or not entry.is_file() for entry in entries):
        return False
    manifest = read_json_or_none(folder / MANIFEST)
    hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
    # What it names is what is there, so no name leads out of the folder.
    if not isinstance(hashes, dict) or {*hashes, MANIFEST} != {entry.name for entry in entries} or STATE not in hashes:
        return False
    return all(file_hash(folder / name) == digest for name, digest in hashes.items())


def _is_state(state: Any, name: str) -> bool:
    """Whether it is the state of the checkpoint of this name; what the parts saved is theirs to check."""
    if not isinstance(state, dict) or type(state.get("step")) is not int or checkpoint_name(state["step"]) != name:
        return False
    lengths = state.get("log_lengths")
    return isinstance(lengths, dict) and all(type(length) is int and length >= 0 for length in lengths.values())


def exact_json(state: Any) -> bytes:
    """JSON from which Python reads `state` as it was: floats to the last bit, inf and nan among them.

    Raises:
        TypeError: a value that would come back as another (a tuple, a NumPy number) or not at all (a tensor).
    """
    _require_plain(state)
    return json.dumps(state).encode()


def _require_plain(value: Any) -> None:
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"a key of the state of a checkpoint must be text, found {key!r}")
            _require_plain(item)
    elif type(value) is list:
        for item in value:
            _require_plain(item)
    elif type(value) not in _PLAIN:
        raise TypeError(f"the state of a checkpoint holds plain values, found {type(value).__name__}")


def read_json_or_none(path: Path) -> Any:
    """The value that a JSON file holds; None if what it holds is no JSON. Raises OSError if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


def _files_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[bytes]:
    """Contents of safetensors files of about `FILE_BYTES` that hold these tensors."""
    held: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        held[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
        if size >= FILE_BYTES:
            yield serialize_tensors(held)
            held, size = {}, 0
    if held:
        yield serialize_tensors(held)


def write_synced(path: Path, content: bytes) -> str:
    """Write a file to disk. Returns the SHA-256 of what was meant to be written."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
