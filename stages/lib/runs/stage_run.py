"""A run of a stage that keeps state in the scratch folder: who it is, whether it is finished already, publishing."""

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from stages.lib.command.errors import StageError
from stages.lib.command.file_errors import file_message, no_space_explained
from stages.lib.command.hashing import dvc_hashes
from stages.lib.command.out_of_memory import is_out_of_memory, reason_of
from stages.lib.command.outputs import require_places
from stages.lib.compute.processes import Processes
from stages.lib.operations.run_log import launcher_in_use, log_run
from stages.lib.runs.scratch import ScratchFolder
from stages.lib.settings.declaration import plain
from stages.lib.settings.runtime import Runtime


class StageRun:
    """One run of a stage, on all its processes; files are touched by the main process alone.

    Args:
        stage: its name, with that of what it makes where it makes several: "train_dpo@dpo".
        settings: everything of `params.yaml` that the stage reads, by section.
        inputs: the data and models the stage reads; with `settings` they are the identity of a resumable state.
        outs: name → path of each out to publish.
    Raises:
        StageError: another process runs this stage with the same settings and inputs, an input cannot be read, or
            processes in other folders have other inputs.
    """

    def __init__(
        self,
        stage: str,
        settings: Mapping[str, Any],
        inputs: list[Path],
        outs: dict[str, Path],
        runtime: Runtime,
        processes: Processes,
    ) -> None:
        self.stage = stage
        self.settings = {name: plain(value) for name, value in settings.items()}
        self.outs = outs
        self.runtime = runtime
        self.processes = processes
        self.started = time.monotonic()
        if runtime.on_out_of_memory == "retry" and processes.world_size > 1:
            raise StageError(
                f"runtime.yaml: on_out_of_memory: retry needs one process, and there are {processes.world_size}: the "
                "others would wait for one that repeats its step; set it to stop"
            )
        self.scratch = processes.in_main(
            lambda: ScratchFolder(
                stage,
                self.settings,
                inputs,
                across_code_change=runtime.resume_across_code_change,
                kept_checkpoints=runtime.kept_checkpoints,
            )
        )
        require_same_inputs(processes, inputs, self.scratch.input_hashes if self.scratch else None)

    @property
    def own_scratch(self) -> ScratchFolder:
        """The scratch folder, for what the main process does, which alone has it."""
        assert self.scratch is not None, "only the main process has a scratch folder"
        return self.scratch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self.scratch:
            self.scratch.release()
        if error and is_out_of_memory(error):
            raise StageError(memory_advice(error, self.runtime)) from None

    def already_complete(self) -> bool:
        """Publish the outs of a run that finished but whose end DVC never recorded; True if there was one.

        Raises:
            StageError: one of the outs cannot be put in its place.
        """
        done = self.processes.in_main(self._publish_again)
        if done:
            print(f"{self.stage}: already finished with these settings and inputs; published its result again")
        if self.processes.any(bool(done)):
            return True
        self.processes.in_main(lambda: require_places(self.outs.values()))
        return False

    def _publish_again(self) -> bool:
        """Put the outs of a finished run in place. Raises StageError, saying where they are, if that cannot be done."""
        try:
            with no_space_explained():
                return self.own_scratch.publish_complete(self.outs)
        except OSError as error:
            raise StageError(
                f"{file_message(error)}. The finished result is kept in {self.own_scratch.folder / 'outs'}, and is put "
                "in place when the stage is started again"
            ) from None

    def say(self, text: str) -> None:
        """Print a line, once."""
        if self.processes.is_main:
            print(text, flush=True)

    def publish(self, build: Callable[[dict[str, Path]], None]) -> None:
        """Write all outs and put them in place by rename. `build` fills the path of each name of `outs`.

        Raises:
            StageError: no space is left; what was saved before is as it was.
        """
        self.processes.in_main(lambda: self._publish(build))

    def _publish(self, build: Callable[[dict[str, Path]], None]) -> None:
        with no_space_explained():
            folder = self.own_scratch.stage_outs()
            build({name: folder / name for name in self.outs})
            self.own_scratch.complete(self.outs, self._log_run)
        self._publish_again()

    def _log_run(self, hashes: dict[str, str]) -> None:
        log_run(
            self.stage,
            hashes,
            time.monotonic() - self.started,
            runtime=plain(self.runtime),
            processes=self.processes.world_size,
            device=str(self.processes.device),
            launcher=launcher_in_use(),
        )


def memory_advice(error: BaseException, runtime: Runtime) -> str:
    """What to say of memory that ran out, and which keys of `runtime.yaml` would take less."""
    message = (
        f"out of memory ({reason_of(error)}): lower runtime.yaml: micro_batch_tokens (it is "
        f"{runtime.micro_batch_tokens}), where it was sampling generation_batch_size "
        f"({runtime.generation_batch_size}), where it was in the LM head logits_chunk_tokens "
        f"({runtime.logits_chunk_tokens})"
    )
    if runtime.on_out_of_memory == "stop":
        message += "; on_out_of_memory: retry lets one process halve the first two by itself"
    return f"{message}. What was saved before is kept"


def require_same_inputs(processes: Processes, inputs: list[Path], hashes: dict[str, str] | None) -> None:
    """Raise StageError if processes of other machines, or in other folders, would read other content.

    One process of each folder hashes its inputs; `hashes` are those that the main process has found.
    """
    places = processes.gather([f"{socket.gethostname()}:{Path.cwd()}"])
    if len(set(places)) == 1:
        return
    first_there = places.index(places[processes.rank]) == processes.rank
    try:
        own = hashes or (dvc_hashes(inputs) if first_there else {})
    except OSError as error:
        own = {str(path): f"{error.filename}: {error.strerror}" for path in inputs}
    found = processes.gather([own])
    for place, theirs in zip(places, found, strict=True):
        for path, digest in theirs.items():
            if digest != found[0][path]:
                raise StageError(
                    f"{path} in {place} is not what it is in {places[0]}; give all machines the same files"
                )
