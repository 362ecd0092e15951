"""TensorBoard as a tracker: event files in one folder a run, read with `tensorboard --logdir`."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.operations.tracker import Row


class TensorBoardTracker:
    """Writes each row as scalars of its step, and the settings as hyperparameters.

    torch's SummaryWriter does the same from a thread of its own, in which an error of the disk ends in a traceback and
    up to two minutes of rows are lost by a kill. Here each row is on its way to the disk, or the error raised, when
    `log` returns.

    Args:
        folder: of this run's event files; an attempt that is resumed adds one.
    """

    def __init__(self, folder: Path, stage: str, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.hyperparameters = {"stage": stage, **flat(settings)}
        self.last_step = 0

    def start(self, first_step: int, earlier: list[Row]) -> None:
        from tensorboard.compat.proto import event_pb2

        self.folder.mkdir(parents=True, exist_ok=True)
        files = sorted(self.folder.glob("events.out.tfevents.*"))
        # TensorBoard reads the files of a folder in the order of their names.
        number = int(files[-1].suffix[1:]) + 1 if files else 1
        self.file = self.folder / f"events.out.tfevents.{number:010d}"
        self.file.touch(exist_ok=False)
        self._write(file_version="brain.Event:2")
        # A start at a step hides what earlier files hold from that step on (SummaryWriter's purge_step). All rows are
        # written again, since a killed attempt may have got fewer to its file than to its checkpoint.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=min([first_step, *(row.step for row in earlier)]), session_log=start)
        self._write_hyperparameters()
        for row in earlier:
            self.log(row)
        self.last_step = first_step - 1

    def log(self, row: Row) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
        self._write(wall_time=row.time, step=row.step, summary=Summary(value=scalars))
        self.last_step = row.step

    def finish(self, results: Mapping[str, float], exit_code: int) -> None:
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        if results:
            self.log(Row(self.last_step, time.time(), dict(results)))
        status = api_pb2.STATUS_FAILURE if exit_code else api_pb2.STATUS_SUCCESS
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        self._write_for_plugin(metadata.SESSION_END_INFO_TAG, session_end_info=end)

    def give_up(self) -> None:
        pass

    def _write_hyperparameters(self) -> None:
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        start = plugin_data_pb2.SessionStartInfo(group_name=self.folder.name, start_time_secs=time.time())
        for name, value in self.hyperparameters.items():
            kind = "string" if isinstance(value, str) else "bool" if isinstance(value, bool) else "number"
            setattr(start.hparams[name], f"{kind}_value", value)
        self._write_for_plugin(metadata.SESSION_START_INFO_TAG, session_start_info=start)

    def _write_for_plugin(self, tag: str, **content: Any) -> None:
        """A summary for the hyperparameter plugin, whose own builders need TensorFlow."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
        self._write(summary=Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)]))

    def _write(self, *, wall_time: float | None = None, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with self.file.open("r+b") as file:  # which fails where the file has gone
            file.seek(0, 2)
            RecordWriter(file).write(Event(wall_time=wall_time or time.time(), **content).SerializeToString())


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings as one level of keys, `train_sft.optimizer.learning_rate`; None and lists become JSON text."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found
