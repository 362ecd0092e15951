"""Where training state lives between a kill and the next start: outside DVC's outs, which DVC deletes before a run.

`$STAGEWISE_SCRATCH` (or `.scratch/`) holds a folder per stage and fingerprint of (settings, content of every input), so
other settings or inputs never resume an old state:

    train_rm@rm-0a1b2c3d4e5f6071/
        lock                        held while a process writes here
        code-9f8e7d6c5b4a3f2e/      what this version of the stage's code has saved
            checkpoint-00000040/    state.json, tensors-*.safetensors, manifest.json (checksums)
            logs/                   files that grow as training goes on; a checkpoint knows their lengths
            models/                 whole model folders of steps on the way
        kept/                       partial results of a stage that has no checkpoints
        outs/ + complete.json       the finished outs, until dvc.lock holds their hashes
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash, dvc_hashes, value_hash
from stages.lib.command.outputs import remove, replace, written_whole
from stages.lib.operations.code_closure import running_hash
from stages.lib.operations.scratch_root import scratch_root
from stages.lib.runs.checkpoints import (
    Checkpoint,
    checkpoint_name,
    checkpoints_in,
    is_pickled,
    open_checkpoint,
    read_json_or_none,
    sync,
    write_checkpoint,
    write_synced,
)
from stages.lib.runs.step_models import add_model, take_models


class ScratchFolder:
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
        self.code = running_hash()
        self.across_code_change = across_code_change
        self.kept_checkpoints = kept_checkpoints
        # In the order given, which says what each input is to the stage.
        fingerprint = value_hash([settings, [[str(path), self.input_hashes[str(path)]] for path in inputs]])
        self.folder = scratch_root() / f"{stage}-{fingerprint[:16]}"
        self.state = self.folder / f"code-{self.code[:16]}"
        self.logs = self.state / "logs"
        self.models = self.state / "models"
        self.kept = self.folder / "kept"
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            lock = taken_lock(self.folder)
            self._refuse_links()
        except OSError as error:
            raise StageError(f"training state cannot be kept in {self.folder}: {error}") from None
        if lock is None:
            raise StageError(
                f"{self.folder} is in use: another process runs this stage with the same settings and inputs; "
                "wait for it, or stop it"
            )
        self._lock = lock

    def _refuse_links(self) -> None:
        """Raise StageError for a link in place of a folder whose files are removed in time."""
        for path in (self.state, self.logs, self.models, self.kept):
            if path.is_symlink():
                raise StageError(f"{path} is a link; remove it, or have $STAGEWISE_SCRATCH name another folder")

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
            write_synced(partial, content)
            replace(partial, self.kept / name)
            sync(self.kept)
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
        final = self.state / checkpoint_name(step)
        partial = self.state / f"{final.name}.partial"
        try:
            remove(partial)
            partial.mkdir()
            for log in self.logs.iterdir():
                sync(log)
            write_checkpoint(partial, step, {**state, "log_lengths": _log_lengths(self.logs)}, tensors)
            remove(final)
            partial.rename(final)
            sync(self.state)
        except OSError as error:
            remove(partial)
            raise StageError(f"checkpoint of step {step} cannot be written to {self.state}: {error}") from None
        before = [path for path in checkpoints_in(self.state) if path.name <= final.name][-self.kept_checkpoints :]
        for other in checkpoints_in(self.state):
            if other not in before:
                with contextlib.suppress(OSError):  # what a file system holds back goes with the next one
                    remove(other)

    def keep_model(self, step: int, keep_last: int | None, write: Callable[[Path], None]) -> None:
        """Keep a whole model folder of a step (1-based), and of all such the last `keep_last`, until the run is done.

        Raises:
            StageError: the disk is full or not writable; the folders before are as they were.
        """
        try:
            add_model(self.models, step, keep_last, write)
        except OSError as error:
            raise StageError(f"the model of step {step} cannot be written to {self.models}: {error}") from None

    def load(self) -> "Checkpoint | None":
        """The newest checkpoint that is whole and may be used, or None; the logs are cut to its lengths.

        What another version of the code has saved is used if that was asked for, and it is further. Otherwise the
        furthest of it stays, for a start that asks for it, and the rest goes.

        Raises:
            StageError: a checkpoint cannot be read for another reason than damage; everything stays as it is.
        """
        for folder in sorted(self._candidates(), key=lambda path: (path.name, path.parent == self.state), reverse=True):
            checkpoint = open_checkpoint(folder)
            if checkpoint is None:
                print(f"warning: {folder} is damaged (its checksum differs); trying the one before it", file=sys.stderr)
                continue
            if not self._take_logs(folder.parent / "logs", checkpoint.state.pop("log_lengths")):
                print(f"warning: {self.logs} lacks lines that {folder} counts on; trying another", file=sys.stderr)
                continue
            take_models(folder.parent / "models", self.models, checkpoint.state["step"])
            if folder.parent != self.state:
                print(f"note: {folder} was made by other code; going on from it, as runtime.yaml asks", flush=True)
            print(f"resuming from step {checkpoint.state['step']} ({folder})", flush=True)
            return checkpoint
        for log in self.logs.iterdir():
            remove(log)
        remove(self.models)
        return None

    def _candidates(self) -> list[Path]:
        """The checkpoints that may be used, after making room."""
        own = checkpoints_in(self.state)
        others = [path for state in self.folder.glob("code-*") if state != self.state for path in checkpoints_in(state)]
        found = own + others if self.across_code_change else own or others
        if found and all(map(is_pickled, found)):
            print(
                f"note: {max(found)} holds a pickle, as earlier code kept its state; none is loaded, so this run "
                "starts from the beginning",
                flush=True,
            )
            return []
        if self.across_code_change:
            return [path for path in found if not is_pickled(path)]
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
        """Make the logs those of `source`, cut to these lengths; one that is not among them was begun later, and goes.

        Returns False, doing nothing, if one is shorter.
        """
        found = _log_lengths(source)
        if any(found.get(name, -1) < length for name, length in lengths.items()):
            return False
        if source != self.logs:
            remove(self.logs)
            shutil.copytree(source, self.logs)
        for name in found.keys() - lengths.keys():
            remove(self.logs / name)
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
        write_synced(self.folder / "complete.json.partial", json.dumps(record).encode())
        log({out["path"]: out["dvc_hash"] for out in made.values()})
        (self.folder / "complete.json.partial").rename(self.folder / "complete.json")
        sync(self.folder)

    def _outs_are_whole(self, record: dict[str, Any], names: Iterable[str]) -> bool:
        if record["outs"].keys() != set(names):
            return False
        try:
            return all(dvc_hash(self.folder / "outs" / name) == record["outs"][name]["dvc_hash"] for name in names)
        except OSError:
            return False  # one is not there, or cannot be read

    def publish_complete(self, outs: dict[str, Path]) -> bool:
        """Copy the outs of a complete run to their places. Returns False if no run is complete.

        What other code has finished, or is damaged, is then taken for unfinished: it will be made again in this folder,
        which `stages.tools.prune_scratch` must not remove.
        """
        record = completed_record(self.folder)
        mark = self.folder / "complete.json"
        if record is None and not mark.exists() and not mark.is_symlink():
            return False
        usable = record is not None and record["code"] == self.code and self._outs_are_whole(record, outs)
        if not usable and (record is None or record["code"] == self.code):
            print(f"warning: the finished outs in {self.folder} are damaged; not using them", file=sys.stderr)
        if not usable:
            remove(mark)
            return False
        with written_whole(*outs.values()) as partials:
            for name, partial in zip(outs, partials, strict=True):
                source = self.folder / "outs" / name
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, partial)
        return True


def taken_lock(folder: Path) -> IO[str] | None:
    """The lock of a scratch folder, to be closed; None if another process holds it. Raises OSError."""
    lock = os.fdopen(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
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
    """What a finished run left in its scratch folder, or None if it is not finished, or that is not legible."""
    try:
        record = read_json_or_none(folder / "complete.json")
    except OSError:
        return None
    return record if _is_record(record) else None


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("code"), str):
        return False
    outs = record.get("outs")
    return (
        isinstance(outs, dict)
        and bool(outs)
        and all(
            isinstance(out, dict) and all(isinstance(out.get(key), str) for key in ("path", "dvc_hash"))
            for out in outs.values()
        )
    )


def _log_lengths(logs: Path) -> dict[str, int]:
    return {log.name: log.stat().st_size for log in sorted(logs.iterdir())} if logs.is_dir() else {}
