"""TensorBoard as a tracker: event files in one folder a run, read with `tensorboard --logdir`."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.lib.operations.tracker import ShownReply, TrackedRow


class TensorBoardTracker:
    """Writes each row as scalars of its step, and the settings as hyperparameters, with torch's SummaryWriter.

    Every row is flushed, so that it is in the file before a checkpoint counts on it; a resumed run then only hides what
    is there of the steps that it makes again (`purge_step`).

    Args:
        folder: of this run's event files; an attempt that is resumed adds one.
        first_step: the step (1-based) that comes next.
        earlier: reads the rows of the steps before, which are written where the folder is new.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        first_step: int,
        earlier: Callable[[], Sequence[TrackedRow]],
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        leave_errors_to_the_caller()
        known = any(folder.glob("events.out.tfevents.*"))
        self.writer = SummaryWriter(str(folder), purge_step=first_step)
        self.last_step = first_step - 1
        if not known:
            self.writer.add_hparams(flat_settings(settings), {}, run_name=".")
            for row in earlier():
                self.log(*row)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # and raise what its thread met
        self.last_step = step

    def log_replies(self, step: int, replies: Sequence[ShownReply]) -> None:
        """As quoted text: TensorBoard reads Markdown, and these are no one's markup."""
        for place, (prompt, reply) in enumerate(replies, start=1):
            quoted = "\n".join(f"    {line}" for line in f"{prompt}\n---\n{reply}".splitlines())
            self.writer.add_text(f"replies/{place}", quoted, step)
        self.writer.flush()

    def finish(self, results: Mapping[str, float], _exit_code: int) -> None:
        self.log(self.last_step, results)
        self.writer.close()


def leave_errors_to_the_caller() -> None:
    """Have SummaryWriter's thread print no traceback of an error, which `flush` raises anyway."""
    before = threading.excepthook

    def excepthook(error: threading.ExceptHookArgs) -> None:
        if type(error.thread).__name__ != "_AsyncWriterThread":
            before(error)

    threading.excepthook = excepthook


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings as one level of keys, `train_sft.optimizer.learning_rate`; None and lists become JSON text."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat_settings(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found
