"""Training state that was damaged, or put there by a stranger with checksums that fit."""

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.areas.odd_configs import PICKLE
from tests.fuzz.base import other_than_base
from tests.fuzz.case import Area, Case, Complaint, Expected, no_complaint, put
from tests.fuzz.mutations import json_text, mutated_bytes, mutated_tree

TRAINED = ("train_sft@sft", "train_rm@rm", "train_dpo@dpo", "train_ppo@ppo", "train_grpo@grpo")
CHUNKED = ("ref_logprobs@sft", "evaluate@dpo", "score_samples@dpo")


def scratch(folder: Path, stage: str) -> Path:
    return next((folder / ".scratch").glob(f"{stage}-*"))


def checkpoint(folder: Path, stage: str) -> Path:
    """The newest checkpoint."""
    return max(scratch(folder, stage).glob("code-*/checkpoint-*"))


def state_file(folder: Path, stage: str) -> Path:
    """What a checkpoint holds beside tensors and manifest."""
    known = ("manifest.json",)
    return next(
        path for path in checkpoint(folder, stage).iterdir() if path.name not in known and "tensors" not in path.name
    )


def unfinished(folder: Path, stage: str) -> None:
    """Take away the mark of a finished run: the stage then goes on from its last checkpoint."""
    (scratch(folder, stage) / "complete.json").unlink()
    shutil.rmtree(scratch(folder, stage) / "outs")


def signed(path: Path) -> None:
    """Give the file its checksum in the manifest, as whoever put it there would."""
    manifest = path.parent / "manifest.json"
    values = json.loads(manifest.read_text())
    values["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    put(manifest, json.dumps(values))


def case(what: str, stage: str, act: Callable[[Path, str], object], expected: Expected = "either") -> Case:
    def prepare(folder: Path) -> None:
        unfinished(folder, stage)
        act(folder, stage)

    return Case(f"{stage}: {what}", prepare, (stage,), expected, complaint=same_as_undisturbed(stage))


def same_as_undisturbed(stage: str) -> Complaint:
    return lambda folder, accepted: other_than_base(folder, stage) if accepted else None


def finished(what: str, stage: str, text: str, expected: Expected = "accepted") -> Case:
    """A run that has finished, with another complete.json."""
    return Case(
        f"{stage}: complete.json {what}",
        lambda folder: put(scratch(folder, stage) / "complete.json", text),
        (stage,),
        expected,
        complaint=same_as_undisturbed(stage),
    )


def state(content: bytes) -> Callable[[Path, str], None]:
    def act(folder: Path, stage: str) -> None:
        path = state_file(folder, stage)
        put(path, content)
        signed(path)

    return act


def pickled(value: Any) -> bytes:
    made = io.BytesIO()
    torch.save(value, made)
    return made.getvalue()


class Runs:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch pwned",)


def manifest(text: str) -> Callable[[Path, str], None]:
    return lambda folder, stage: put(checkpoint(folder, stage) / "manifest.json", text)


def tensors(content: bytes) -> Callable[[Path, str], None]:
    def act(folder: Path, stage: str) -> None:
        path = next(checkpoint(folder, stage).glob("*.safetensors"))
        put(path, content)
        signed(path)

    return act


def log(act: Callable[[Path], object]) -> Callable[[Path, str], object]:
    return lambda folder, stage: act(next(scratch(folder, stage).glob("code-*/logs/curve.csv")))


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path, str], object]:
    """A file or folder of the scratch folder replaced by something else."""

    def act(folder: Path, stage: str) -> None:
        path = next(scratch(folder, stage).glob(name))
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        make(path)

    return act


COMPLETE = ("[]", "{}", "null", "5", '"x"', "", "{", '{"code": 5}', '{"code": "x", "outs": []}', '{"outs": {}}')
COMPLETE += (
    '{"code": null, "outs": null}',
    "[" * 100_000,
    '{"code": ' + "9" * 5000 + "}",
    "\x00",
    '{"outs": {"../x": {}}}',
)
MANIFESTS = (
    "[]",
    "{}",
    "null",
    "",
    "{",
    '{"sha256": []}',
    '{"sha256": null}',
    '{"sha256": {}}',
    '{"sha256": {"../x": "y"}}',
)
MANIFESTS += ('{"sha256": {"state.pt": null}}', "[" * 100_000, '{"step": 1, "sha256": {"/etc/passwd": "0"}}')
STATES: tuple[tuple[str, bytes], ...] = (
    ("a pickle that runs a command", pickled({"step": 1, "parts": {}, "log_lengths": {}, "x": Runs()})),
    ("a bare pickle that runs a command", PICKLE),
    ("an empty dict", pickled({})),
    ("a list", pickled([1])),
    ("no parts", pickled({"step": 1, "parts": {}, "log_lengths": {}})),
    ("parts that are a list", pickled({"step": 1, "parts": [], "log_lengths": {}})),
    ("a step that is text", pickled({"step": "one", "parts": {"engine": {}, "best": {}}, "log_lengths": {}})),
    ("nothing", b""),
    ("JSON: []", b"[]"),
    ("JSON: {}", b"{}"),
    ("JSON: null", b"null"),
    ("JSON without parts", b'{"step": 1, "parts": {}, "log_lengths": {}}'),
    ("JSON with odd parts", b'{"step": -1, "parts": {"engine": 5, "best": null}, "log_lengths": {"../../x": 5}}'),
    ("bytes of zero", bytes(100)),
)
NAMED = (
    *(case("nothing wrong", stage, lambda *_: None, "accepted") for stage in (*TRAINED, *CHUNKED)),
    *(
        finished(f"is {text[:40]!r}", stage, text)
        for stage in ("train_sft@sft", "ref_logprobs@sft")
        for text in COMPLETE
    ),
    *(case(f"state: {what}", "train_sft@sft", state(content)) for what, content in STATES),
    *(case(f"state: {what}", "train_ppo@ppo", state(content)) for what, content in STATES[:2]),
    *(case(f"manifest is {text[:40]!r}", "train_sft@sft", manifest(text), "accepted") for text in MANIFESTS),
    case("tensors: nothing", "train_sft@sft", tensors(b"")),
    case("tensors: no weights", "train_sft@sft", tensors((2).to_bytes(8, "little") + b"{}")),
    case("tensors: a pickle", "train_sft@sft", tensors(PICKLE)),
    case("the curve is shorter", "train_sft@sft", log(lambda path: put(path, path.read_bytes()[:20])), "accepted"),
    case("the curve is missing", "train_sft@sft", log(lambda path: path.unlink()), "accepted"),
    case("the curve is longer", "train_sft@sft", log(lambda path: put(path, path.read_bytes() + b"x,y\n")), "accepted"),
    case("the curve is a folder", "train_sft@sft", log(lambda path: (path.unlink(), path.mkdir()))),
    case("the lock is a folder", "train_sft@sft", replaced("lock", lambda path: path.mkdir()), "refused"),
    case("the logs are a file", "train_sft@sft", replaced("code-*/logs", lambda path: put(path, "x")), "refused"),
    case("the state is a file", "train_sft@sft", replaced("code-*", lambda path: put(path, "x")), "refused"),
    case("the checkpoint is a file", "train_sft@sft", replaced("code-*/checkpoint-*", lambda path: put(path, "x"))),
    case(
        "the checkpoint is a dangling link",
        "train_sft@sft",
        replaced("code-*/checkpoint-*", lambda path: path.symlink_to("x")),
    ),
    case("the kept results are a file", "ref_logprobs@sft", replaced("kept", lambda path: put(path, "x")), "refused"),
    Case(
        "the scratch folder is a file",
        lambda folder: (shutil.rmtree(folder / ".scratch"), put(folder / ".scratch", "x")),
        ("train_sft@sft",),
        "refused",
    ),
    Case(
        "the scratch folder is a dangling link",
        lambda folder: (shutil.rmtree(folder / ".scratch"), (folder / ".scratch").symlink_to("x/y")),
        ("train_sft@sft",),
        "refused",
    ),
    Case(
        "the log of runs is a folder",
        lambda folder: ((folder / ".scratch/runs.jsonl").unlink(), (folder / ".scratch/runs.jsonl").mkdir()),
        ("train_sft@sft",),
        "accepted",
    ),
)


def chunk(folder: Path, stage: str) -> Path:
    return sorted(scratch(folder, stage).glob("kept/*.json"))[0]


def with_checksum(change: Callable[[Any], Any]) -> Callable[[Path, str], None]:
    """Change what was kept of some rows, and give it the checksum that fits."""

    def act(folder: Path, stage: str) -> None:
        from stages.lib.command.hashing import value_hash

        path = chunk(folder, stage)
        record = json.loads(path.read_text())
        record["value"] = change(record["value"])
        put(path, json_text(record | {"sha256": value_hash(record["value"])}))

    return act


def first_value(make: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda value: {key: make(items) if place == 0 else items for place, (key, items) in enumerate(value.items())}


KEPT: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("a list", lambda value: list(value)),
    ("null", lambda _: None),
    ("empty", lambda _: {}),
    ("a column missing", lambda value: dict(list(value.items())[1:])),
    ("a column shorter", first_value(lambda items: items[:-1])),
    ("a column of texts", first_value(lambda items: [str(item) for item in items])),
    ("a column of nulls", first_value(lambda items: [None] * len(items))),
    ("a column of NaN", first_value(lambda items: [float("nan")] * len(items))),
    ("a column that is a number", first_value(lambda _: 5)),
)
CHUNKS = (
    *(case(f"kept rows: {what}", stage, with_checksum(change)) for stage in CHUNKED for what, change in KEPT),
    *(
        case(
            f"kept rows are {text[:40]!r}",
            "ref_logprobs@sft",
            lambda folder, stage, text=text: put(chunk(folder, stage), text),
            "accepted",
        )
        for text in COMPLETE
    ),
)


def mutated(draw: random.Random) -> Case:
    """One file of the state damaged; half of the time with a checksum that fits."""
    stage = draw.choice((*TRAINED, *CHUNKED))
    place, fits = draw.random(), draw.random() < 0.5

    def act(folder: Path, stage: str) -> None:
        again = random.Random(place)
        files = sorted(path for path in scratch(folder, stage).rglob("*") if path.is_file() and path.stat().st_size)
        path = again.choice(files)
        content = path.read_bytes()
        if path.suffix == ".json" and again.random() < 0.7:
            put(path, json_text(mutated_tree(json.loads(content), again)[1]))
            return
        put(path, mutated_bytes(content, again)[1])
        if fits and path.parent.name.startswith("checkpoint-") and path.name != "manifest.json":
            signed(path)

    def finished_act(folder: Path) -> None:
        act(folder, stage)

    what = f"one file changed ({place}{', checksum fits' if fits else ''})"
    if draw.random() < 0.3:
        return Case(f"{stage}, finished: {what}", finished_act, (stage,))
    # No one can tell numbers with a checksum that fits from those that were saved.
    return case(what, stage, act)._replace(**({"complaint": no_complaint} if fits else {}))


AREA = Area(
    needs=("data", "models", "metrics", ".scratch"),
    named=(*NAMED, *CHUNKS),
    mutated=mutated,
    share=0.05,
)
