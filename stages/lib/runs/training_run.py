"""What every training script needs around its loop: resume, curve, checkpoints, signals, publishing.

The loop itself stands in the script, or in `objectives.fit`:

    with TrainingRun("train_sft", settings, inputs, outs, columns, runtime, processes) as run:
        if run.already_complete():
            return
        ...
        for step in run.steps(total_steps, engine=engine):
            ...
            run.record(step, tokens, metrics, shown)
        run.publish(build)
"""

import collections
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import value_hash
from stages.lib.command.jsonl import write_json
from stages.lib.compute.engine.base import Engine
from stages.lib.compute.processes import Processes
from stages.lib.models.lora import Lora
from stages.lib.models.pretrained import save_model
from stages.lib.operations.greedy_replies import console_lines
from stages.lib.operations.progress import Progress
from stages.lib.operations.stop_signal import StopSignal
from stages.lib.operations.tracker import ShownReply
from stages.lib.operations.trackers import Trackers
from stages.lib.runs.checkpoints import Checkpoint
from stages.lib.runs.curve import Curve
from stages.lib.runs.model_card import write_model_card
from stages.lib.runs.stage_run import StageRun
from stages.lib.runs.step_models import copy_models
from stages.lib.settings.runtime import Runtime
from stages.lib.settings.save_every import SaveEvery

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAVING_PAYS = 10.0  # seconds of training for each second of saving: with billions of weights that takes minutes


class Stateful(Protocol):
    """A part of the training state that a checkpoint holds; all processes call its methods together."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class LargeState(Protocol):
    """A part with tensors too large to be gathered at once: they are saved and read one by one, by name."""

    def state_dict(self) -> dict[str, Any]: ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def load_state_dict(self, state: dict[str, Any], read: Callable[[str], torch.Tensor]) -> None: ...


class Pace:
    """When the next checkpoint is due: `seconds` after the last, and so late that saving takes a tenth of the time.

    One save that takes long counts for nothing: a disk that has hung once is a reason to save, not to wait.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.saved_at = time.monotonic()
        self.saves_took = [0.0, 0.0]  # the last two

    def is_due(self) -> bool:
        """Always, if `seconds` is 0."""
        wait = max(self.seconds, SAVING_PAYS * min(self.saves_took)) if self.seconds else 0.0
        return time.monotonic() - self.saved_at >= wait

    @contextmanager
    def saving(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.saved_at = time.monotonic()
        self.saves_took = [self.saves_took[1], self.saved_at - started]


class SavesModels(Protocol):
    """What `keep_model` reads of a section of params.yaml."""

    @property
    def save_every(self) -> SaveEvery | None: ...

    @property
    def save_dtype(self) -> str: ...


class TrainingRun(StageRun):
    """One run of a training stage, on all its processes.

    Args:
        outs: name → path of each out to publish; "curve" is the CSV this class writes itself.
        columns: of the curve, beside `step`.
    """

    def __init__(
        self,
        stage: str,
        settings: Mapping[str, Any],
        inputs: list[Path],
        outs: dict[str, Path],
        columns: tuple[str, ...],
        runtime: Runtime,
        processes: Processes,
    ) -> None:
        super().__init__(stage, settings, inputs, outs, runtime, processes)
        self.columns = columns
        self.trackers: Trackers | None = None
        if self.scratch:
            # Another version of the code, or other settings or inputs, make another run of it.
            identity = value_hash([self.scratch.folder.name, self.scratch.code])[:8]
            self.trackers = Trackers(stage, self.settings, runtime, identity)
        self.stop = StopSignal(stage, processes, runtime.stop_seconds)
        self.progress: Progress | None = None
        self.curve: Curve | None = None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self.trackers:
            self.trackers.close(0 if error is None else 128 + self.stop.number if self.stop.number else 1)
        super().__exit__(_kind, error, _trace)

    def steps(self, total: int, **parts: Stateful | LargeState) -> Iterator[int]:
        """Yield the optimizer steps that are left, 0-based, and checkpoint `parts` on time, on a signal and at the end.

        A signal (SIGTERM, Ctrl-C) saves and exits with 128 + its number once the step under way is over, or in its
        middle where the step calls `may_stop`.
        """
        self.parts = parts
        first = self.saved_step = self._restore(parts)
        if self.scratch and self.trackers:
            self.curve = Curve(self.scratch.logs / "curve.csv", self.columns)
            self.progress = Progress(self.stage, total, self.runtime.log_seconds, first=first)
            self.trackers.start(first + 1, self.curve.rows)
        self.last_record = time.monotonic()
        pace = Pace(self.runtime.checkpoint_seconds)
        with self.stop:
            for self.step in range(first, total):
                yield self.step
                self.step += 1
                due = self.processes.broadcast(pace.is_due())
                if due or self.step == total:
                    with pace.saving():
                        self._save_now()
                self.may_stop()

    def may_stop(self) -> None:
        """Save and exit if a signal has come: for a long step, where nothing that a checkpoint holds has changed yet.

        All processes call this together.
        """
        if self.stop.agreed():
            self._keep_state()
            self.stop.leave(f"state saved at step {self.step}")

    @contextmanager
    def keeping_state(self, *errors: type[Exception], changed: bool = False) -> Iterator[None]:
        """Save the state before one of these errors ends the run.

        For a part of a step that changes nothing a checkpoint holds, and for errors that all processes raise.

        Args:
            changed: the step has changed what a checkpoint holds before this part began, and goes on from there when
                its parts are loaded.
        """
        try:
            yield
        except errors:
            if changed:
                self._save_now()
            else:
                self._keep_state()
            raise

    def _keep_state(self) -> None:
        if self.saved_step != self.step:
            self._save_now()

    def _save_now(self) -> None:
        with self.stop.saving():
            self._save(self.step, self.parts)
        self.saved_step = self.step

    def _restore(self, parts: Mapping[str, Stateful | LargeState]) -> int:
        loaded = self.processes.in_main(lambda: self.own_scratch.load())
        state = self.processes.broadcast(loaded.state if loaded else None)
        if state is None:
            return 0
        other = other_things(state.get("parts"), {name: part.state_dict() for name, part in parts.items()})
        if other:
            raise StageError(
                f"the checkpoint of step {state['step']} is of code that saved other things ({other}); "
                "set runtime.yaml: resume_across_code_change: false"
            )
        for name, part in parts.items():
            if isinstance(part, LargeState):
                part.load_state_dict(state["parts"][name], self._reader(loaded, name))
            else:
                part.load_state_dict(state["parts"][name])
        return state["step"]

    def _reader(self, loaded: Checkpoint | None, part: str) -> Callable[[str], torch.Tensor]:
        """Reads a tensor from disk in the main process and hands it to all."""

        def read(name: str) -> torch.Tensor:
            return self.processes.broadcast_tensor(loaded.read(f"{part}/{name}") if loaded else None)

        return read

    def _save(self, step: int, parts: Mapping[str, Stateful | LargeState]) -> None:
        state = {"step": step, "parts": {name: part.state_dict() for name, part in parts.items()}}
        tensors = (
            (f"{name}/{key}", tensor)
            for name, part in parts.items()
            if isinstance(part, LargeState)
            for key, tensor in part.tensors()
        )

        def save() -> None:
            try:
                self.own_scratch.save(step, state, tensors)
            finally:
                collections.deque(tensors, maxlen=0)  # the others are gathering with us, to the last one

        if not self.processes.is_main:
            collections.deque(tensors, maxlen=0)
        self.processes.in_main(save)

    def record(self, step: int, units: int, metrics: Mapping[str, float], shown: tuple[str, ...]) -> None:
        """Add the row of a finished step (0-based) to the curve and show some of it.

        `units`: tokens that the model has read in it, without padding; in RL those of the responses alone.
        """
        if self.curve and self.progress and self.trackers:
            self.curve.append(step + 1, metrics)
            self.trackers.log(step + 1, {**metrics, **self._performance(units)})
            self.progress.update(step + 1, units, {name: metrics[name] for name in shown if name in metrics})

    def show_replies(self, step: int, replies: Sequence[ShownReply]) -> None:
        """Print what the model answers after a step (0-based), before the step is recorded, and send it to trackers."""
        for line in console_lines(replies):
            self.say(line)
        if self.trackers:
            self.trackers.log_replies(step + 1, replies)

    def _performance(self, units: int) -> dict[str, float]:
        """Of the step just done, for trackers: tokens per second since the step before, and this process's peak memory.

        The seconds are all that went by, those of an evaluation or a checkpoint included.
        """
        now = time.monotonic()
        since, self.last_record = self.last_record, now
        values = {
            "perf/tokens_per_second": units / max(now - since, 1e-9),
            "perf/peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        if self.processes.device.type == "cuda":
            values["perf/peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.processes.device) / 2**20
        return values

    def log_file(self, name: str) -> Path | None:
        """A file that grows during training and is cut back when a checkpoint is resumed (main process only)."""
        return self.scratch.logs / name if self.scratch else None

    def keep_model(self, step: int, engine: Engine, lora: Lora, settings: SavesModels, *, tokenizer_from: Path) -> None:
        """Keep a whole model folder of a step (0-based) if one is due after it: models/<name>/step_<n>, 1-based.

        All processes call this together, before the step's checkpoint. The weights are those that would be published.
        """
        due = settings.save_every
        if due is None or (step + 1) % due.steps:
            return
        with engine.averaged():
            weights = engine.master_weights(lora.model)

            def write(folder: Path) -> None:
                merged, dtype = lora.merged(weights), settings.save_dtype
                save_model(lora.model, merged, folder, save_dtype=dtype, tokenizer_from=tokenizer_from)
                inputs = self.own_scratch.input_hashes
                card = {"stage": self.stage, "settings": self.settings, "inputs": inputs}
                write_model_card(folder, **card, metrics={"step": step + 1, **lora.counts()})
                lora.save_adapter(lora.trained(weights), folder, dtype)

            self.processes.in_main(lambda: self.own_scratch.keep_model(step + 1, due.keep_last_k, write))

    def publish(self, build: Callable[[dict[str, Path]], None]) -> None:
        """As StageRun.publish; "curve" is filled here."""

        def build_all(staged: dict[str, Path]) -> None:
            build(staged)
            if "curve" in self.outs:
                staged["curve"].write_bytes((self.own_scratch.logs / "curve.csv").read_bytes())

        super().publish(build_all)

    def publish_model(
        self,
        model: "PreTrainedModel",
        weights: dict[str, torch.Tensor],
        results: Mapping[str, float],
        *,
        save_dtype: str,
        tokenizer_from: Path,
        build_others: Callable[[dict[str, Path]], None] | None = None,
    ) -> None:
        """Publish "model" (with its card), "metrics" (`results`) and "curve"; `build_others` fills the other outs."""

        def build(staged: dict[str, Path]) -> None:
            save_model(model, weights, staged["model"], save_dtype=save_dtype, tokenizer_from=tokenizer_from)
            copy_models(self.own_scratch.models, staged["model"])
            write_model_card(
                staged["model"],
                stage=self.stage,
                settings=self.settings,
                inputs=self.own_scratch.input_hashes,
                metrics=results,
            )
            write_json(staged["metrics"], dict(results))
            if build_others:
                build_others(staged)

        self.publish(build)
        if self.trackers and self.progress:
            self.trackers.add_results(results)


def other_things(saved: Any, own: dict[str, Any], where: str = "") -> str:
    """What a saved state has otherwise than the state of parts that would go on from it, by name; "" if nothing.

    Mappings must have the same keys, unless one is empty or there is none, as of an evaluation that is still to come;
    a number must be a number.
    """
    if not isinstance(saved, dict):
        return where.rstrip(".") or "parts"
    if saved.keys() != own.keys():
        return ", ".join(f"{where}{name}" for name in sorted(saved.keys() ^ own.keys()))
    for name, value in own.items():
        found, place = saved[name], f"{where}{name}"
        if isinstance(value, dict) and value and found:
            other = other_things(found, value, f"{place}.")
        elif isinstance(value, int | float):
            other = "" if type(found) is type(value) else place
        else:
            other = "" if found is None or isinstance(found, dict) else place
        if other:
            return other
    return ""
