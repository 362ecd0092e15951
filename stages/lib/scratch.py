"""Where training state lives between a kill and the next start: outside DVC's outs, which DVC deletes before a run.

`$STAGEWISE_SCRATCH` (or `.scratch/`) holds a folder per stage and fingerprint of (settings, content of every input), so
other settings or inputs never resume an old state:

    train_rm-0a1b2c3d4e5f6071/
        lock                        held while a process writes here
        code-9f8e7d6c5b4a3f2e/      what this version of the stage's code has saved
            checkpoint-00000040/    state.pt, tensors-*.safetensors, manifest.json (checksums)
            logs/                   files that grow as training goes on; a checkpoint knows their lengths
        kept/                       partial results of a stage that has no checkpoints
        outs/ + complete.json       the finished outs, until dvc.lock holds their hashes
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize_tensors

from stages.lib.errors import StageError
from stages.lib.hashing import dvc_hash, dvc_hashes, file_hash, value_hash
from stages.lib.outputs import remove, written_whole
from stages.lib.own_code import code_hash
from stages.lib.scratch_root import scratch_root

FILE_BYTES = 2**30  # tensors of a checkpoint that are gathered before they are written


class Scratch:
    """The scratch folder of one stage with these settings and inputs, held under a lock. Main process only.

    Args:
        kept_checkpoints: how many of the newest checkpoints stay, at least 1.

    Raises:
        StageError: an input cannot be read, another process holds the folder, or nothing can be written there.
    """

    def __init__(
        self,
        stage: str,
        settings: dict[str, Any],
        inputs: Sequence[Path],
        *,
        across_code_change: bool = False,
        kept_checkpoints: int = 2,
    ) -> None:
        self.input_hashes = _hashes_or_message(inputs)
        self.code = code_hash()
        self.across_code_change = across_code_change
        self.kept_checkpoints = kept_checkpoints
        # In the order given, which says what each input is to the stage.
        fingerprint = value_hash([settings, [[str(path), self.input_hashes[str(path)]] for path in inputs]])
        self.folder = scratch_root() / f"{stage}-{fingerprint[:16]}"
        self.state = self.folder / f"code-{self.code[:16]}"
        self.logs = self.state / "logs"
        self.kept = self.folder / "kept"
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            lock = taken_lock(self.folder)
        except OSError as error:
            raise StageError(f"training state cannot be kept in {self.folder}: {error}") from None
        if lock is None:
            raise StageError(
                f"{self.folder} is in use: another process runs this stage with the same settings and inputs; "
                "wait for it, or stop it"
            )
        self._lock = lock

    def release(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def keep(self, name: str, content: bytes) -> None:
        """Write one file of `kept`, whole or not at all.

        Raises:
            StageError: the disk is full or not writable; the files before are as they were.
        """
        partial = self.kept / f"{name}.partial"
        try:
            self.kept.mkdir(exist_ok=True)
            _write_synced(partial, content)
            partial.rename(self.kept / name)
            _sync(self.kept)
        except OSError as error:
            remove(partial)
            raise StageError(f"{self.kept / name} cannot be written: {error}") from None

    def save(self, step: int, state: dict[str, Any], tensors: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        """Write a checkpoint under a temporary name, sync it to disk, rename it, and only then remove others.

        Those of later steps go too: they are of a run that this one did not resume.

        Args:
            state: what is small.
            tensors: what is large, by name; no more than `FILE_BYTES` of it are held at a time.
        Raises:
            StageError: the disk is full or not writable; the earlier checkpoints are as they were.
        """
        final = self.state / f"checkpoint-{step:08d}"
        partial = self.state / f"{final.name}.partial"
        buffer = io.BytesIO()
        torch.save({**state, "log_lengths": _log_lengths(self.logs)}, buffer)
        try:
            remove(partial)
            partial.mkdir()
            for log in self.logs.iterdir():
                _sync(log)
            hashes = {"state.pt": _write_synced(partial / "state.pt", buffer.getbuffer())}
            for place, content in enumerate(_files_of(tensors)):
                name = f"tensors-{place:05d}.safetensors"
                hashes[name] = _write_synced(partial / name, content)
            manifest = {"step": step, "sha256": hashes}
            _write_synced(partial / "manifest.json", json.dumps(manifest).encode())
            _sync(partial)
            remove(final)
            partial.rename(final)
            _sync(self.state)
        except OSError as error:
            remove(partial)
            raise StageError(f"checkpoint of step {step} cannot be written to {self.state}: {error}") from None
        before = [path for path in _checkpoints(self.state) if path.name <= final.name][-self.kept_checkpoints :]
        for other in _checkpoints(self.state):
            if other not in before:
                shutil.rmtree(other, ignore_errors=True)  # what a file system holds back goes with the next one

    def load(self) -> "Checkpoint | None":
        """The newest checkpoint that is whole and may be used, or None; the logs are cut to its lengths.

        What another version of the code has saved is used if that was asked for, and it is further. Otherwise the
        furthest of it stays, for a start that asks for it, and the rest goes.

        Raises:
            StageError: a checkpoint cannot be read for another reason than damage; everything stays as it is.
        """
        for folder in sorted(self._candidates(), key=lambda path: (path.name, path.parent == self.state), reverse=True):
            if not _is_whole(folder):
                print(f"warning: {folder} is damaged (its checksum differs); trying the one before it", file=sys.stderr)
                continue
            checkpoint = Checkpoint(folder)
            if not self._take_logs(folder.parent / "logs", checkpoint.state.pop("log_lengths")):
                print(f"warning: {self.logs} lacks lines that {folder} counts on; trying another", file=sys.stderr)
                continue
            if folder.parent != self.state:
                print(f"note: {folder} was made by other code; going on from it, as runtime.yaml asks", flush=True)
            print(f"resuming from step {checkpoint.state['step']} ({folder})", flush=True)
            return checkpoint
        for log in self.logs.iterdir():
            log.unlink()
        return None

    def _candidates(self) -> list[Path]:
        """The checkpoints that may be used, after making room."""
        own = _checkpoints(self.state)
        others = [path for state in self.folder.glob("code-*") if state != self.state for path in _checkpoints(state)]
        if self.across_code_change:
            return own + others
        furthest = max(others, key=lambda path: path.name, default=None)
        for state in self.folder.glob("code-*"):
            if state != self.state and (furthest is None or state != furthest.parent):
                shutil.rmtree(state, ignore_errors=True)
        if furthest and not own:
            print(
                f"note: {furthest} was made by other code and is not used "
                "(runtime.yaml: resume_across_code_change would use it)",
                flush=True,
            )
        return own

    def _take_logs(self, source: Path, lengths: dict[str, int]) -> bool:
        """Make the logs those of `source`, cut to these lengths. Returns False, doing nothing, if one is shorter."""
        found = _log_lengths(source)
        if any(found.get(name, 0) < length for name, length in lengths.items()):
            return False
        if source != self.logs:
            shutil.rmtree(self.logs)
            shutil.copytree(source, self.logs)
        for name, length in lengths.items():
            os.truncate(self.logs / name, length)
        return True

    def stage_outs(self) -> Path:
        """An empty folder in which to build the finished outs, for `complete` to take over."""
        partial = self.folder / "outs.partial"
        remove(partial)
        remove(self.folder / "complete.json")
        remove(self.folder / "outs")
        partial.mkdir()
        return partial

    def complete(self, outs: dict[str, Path], log: Callable[[dict[str, str]], None]) -> None:
        """Mark the run complete. `outs` maps a name in the folder of `stage_outs` to the path it is published at.

        Args:
            log: gets the hash of each path just before. A kill in between has the run logged twice; after it, a run
                that is not in the log would be published again and never logged.
        """
        partial, final = self.folder / "outs.partial", self.folder / "outs"
        partial.rename(final)
        made = {name: {"path": str(path), "dvc_hash": dvc_hash(final / name)} for name, path in outs.items()}
        record = {"code": self.code, "outs": made}
        _write_synced(self.folder / "complete.json.partial", json.dumps(record).encode())
        log({out["path"]: out["dvc_hash"] for out in made.values()})
        (self.folder / "complete.json.partial").rename(self.folder / "complete.json")
        _sync(self.folder)

    def _outs_are_whole(self, record: dict[str, Any]) -> bool:
        try:
            outs = record["outs"].items()
            return all(dvc_hash(self.folder / "outs" / name) == out["dvc_hash"] for name, out in outs)
        except OSError:
            return False  # one is not there, or cannot be read

    def publish_complete(self, outs: dict[str, Path]) -> bool:
        """Copy the outs of a complete run to their places. Returns False if no run is complete.

        What other code has finished, or is damaged, is then taken for unfinished: it will be made again in this folder,
        which `stages.prune_scratch` must not remove.
        """
        record = completed_record(self.folder)
        if record is None:
            return False
        damaged = record["code"] == self.code and not self._outs_are_whole(record)
        if damaged:
            print(f"warning: the finished outs in {self.folder} are damaged; not using them", file=sys.stderr)
        if damaged or record["code"] != self.code:
            remove(self.folder / "complete.json")
            return False
        with written_whole(*outs.values()) as partials:
            for name, partial in zip(outs, partials, strict=True):
                source = self.folder / "outs" / name
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, partial)
        return True


def taken_lock(folder: Path) -> IO[str] | None:
    """The lock of a scratch folder, to be closed; None if another process holds it."""
    lock = (folder / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _hashes_or_message(inputs: Sequence[Path]) -> dict[str, str]:
    try:
        return dvc_hashes(inputs)
    except OSError as error:
        raise StageError(f"an input cannot be read: {error.filename}: {error.strerror}") from None


def completed_record(folder: Path) -> dict[str, Any] | None:
    """What a finished run left in its scratch folder, or None if it is not finished."""
    try:
        return json.loads((folder / "complete.json").read_text())
    except (OSError, ValueError):
        return None


def _checkpoints(state: Path) -> list[Path]:
    return sorted(path for path in state.glob("checkpoint-*") if not path.name.endswith(".partial"))


def _log_lengths(logs: Path) -> dict[str, int]:
    return {log.name: log.stat().st_size for log in sorted(logs.iterdir())} if logs.is_dir() else {}


def _is_whole(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there, with the checksums of its manifest.

    Raises:
        StageError: a file is there and cannot be read, as on a file system that is gone for a while.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        return all(file_hash(checkpoint / name) == digest for name, digest in manifest["sha256"].items())
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return False
    except OSError as error:
        raise StageError(
            f"{checkpoint} cannot be read: {error.filename}: {error.strerror}; nothing was changed, so start again "
            "once it can be"
        ) from None


class Checkpoint:
    """A checkpoint on disk: its small state, and its tensors, each read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=False)
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


def _write_synced(path: Path, content: bytes | memoryview) -> str:
    """Write a file to disk. Returns the SHA-256 of what was meant to be written."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
