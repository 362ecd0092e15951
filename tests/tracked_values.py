"""What trackers wrote, read back: by TensorBoard's own reader, and record by record from wandb's offline file."""

import json
import struct
from pathlib import Path

Curve = dict[int, dict[str, float]]
BLOCK = 32768
OWN_OF_WANDB = ("_step", "_timestamp", "_runtime")


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each tag as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def tensorboard_texts(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """(step, text) of each tag, without the end that is common to all."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag.removesuffix("/text_summary"): [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
        if tag.startswith("replies/")
    }


def tensorboard_hyperparameters(folder: Path) -> dict[str, object]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder))
    events.Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def wandb_records(file: Path) -> list:
    """The records of a .wandb file: after 7 bytes, the log format of LevelDB with a protobuf Record each."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    records, whole, place = [], b"", 7
    while place + 7 <= len(data):
        left_in_block = BLOCK - place % BLOCK
        if left_in_block < 7:
            place += left_in_block
            continue
        _, length, part = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(whole))
            whole = b""
    return records


def wandb_rows(file: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, values) of each row that was logged, in order, doubles included."""
    rows = []
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append((items["_step"], {name: items[name] for name in items if name not in OWN_OF_WANDB}))
    return rows


def wandb_config(file: Path) -> dict[str, object]:
    (run,) = [record.run for record in wandb_records(file) if record.WhichOneof("record_type") == "run"][:1]
    return {item.key: json.loads(item.value_json) for item in run.config.update}


def wandb_summary(file: Path) -> dict[str, object]:
    summary = {}
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "summary":
            summary |= {item.key or "/".join(item.nested_key): item.value_json for item in record.summary.update}
    return {name: json.loads(value) for name, value in summary.items()}
