"""How an out came to be: the records of `dvc.lock` from the stage that made it back to where the data came from.

A record is what DVC wrote when the stage ran: its command, its settings, and the hash of every file and folder that it
read and wrote. Each hash is compared with what lies in the workspace; content is read anew, nothing is taken from a
file's time or from a cache.
"""

import hashlib
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash
from stages.lib.command.params import GRAPH_FILE, PARAMS_FILE
from stages.lib.command.quoted import nearest
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.operations.code_closure import MANIFESTS, code_hash
from stages.lib.operations.run_log import read_runs, run_that_made
from stages.tools.dvc_lock import LOCK_FILE

MODELS_FOLDER = "models/"
SAME, ALTERED, MISSING, EARLIER = "same", "altered", "missing", "earlier"
Record = dict[str, Any]


class LockedPath(BaseModel):
    path: str
    md5: str | None = None  # what lies elsewhere may have another kind of hash


class LockedStage(BaseModel):
    """What DVC writes of a stage, as far as it is read here."""

    cmd: str | list[str]
    deps: list[LockedPath] = []
    outs: list[LockedPath] = []
    params: dict[str, dict[Any, Any]] = {}


def require_records(stages: Any) -> None:
    """Raise StageError naming the key if these are no records of stages as DVC writes them."""
    try:
        TypeAdapter(dict[str, LockedStage]).validate_python(stages)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in ("stages", *wrong["loc"]))
        raise StageError(f"{LOCK_FILE}: {key}: {wrong['msg']}; DVC writes it otherwise") from None


class Lock:
    """`dvc.lock`, and which stage made what. Raises StageError if it is missing or malformed."""

    def __init__(self) -> None:
        if not LOCK_FILE.is_file():
            raise StageError(f"{LOCK_FILE} is missing: nothing has been made here yet; run `make repro`")
        self.stages: dict[str, Record] = load_yaml(LOCK_FILE).get("stages") or {}
        require_records(self.stages)
        self.maker = {out["path"]: name for name, stage in self.stages.items() for out in stage.get("outs", [])}
        self.hash_of = {out["path"]: out.get("md5") for stage in self.stages.values() for out in stage.get("outs", [])}

    def out_with(self, path: str) -> str | None:
        """The out that is `path` or a folder above it."""
        return next((out for out in self.maker if path == out or path.startswith(f"{out}/")), None)

    def models(self) -> list[str]:
        return [out for out in self.maker if out.startswith(MODELS_FOLDER)]

    def asked_for(self, path: Path) -> str:
        """The out that a user means. Raises StageError naming the outs there are."""
        name = Path(os.path.relpath(path)).as_posix()
        out = self.out_with(name)
        if out is None:
            raise StageError(
                f"{name}: no stage in {LOCK_FILE} makes it{nearest(name, self.maker)}; "
                f"the outs there are: {', '.join(sorted(self.maker)) or 'none'}"
            )
        return out


class Workspace:
    """Hashes of what lies here, each taken once."""

    def __init__(self) -> None:
        self._hashes: dict[str, str | None] = {}

    def hash_of(self, path: str) -> str | None:
        """As DVC hashes a file or folder; None if there is none."""
        if path not in self._hashes:
            self._hashes[path] = dvc_hash(Path(path)) if Path(path).exists() else None
        return self._hashes[path]

    def state(self, path: str, recorded: str | None) -> str:
        here = self.hash_of(path)
        return MISSING if here is None else SAME if here == recorded else ALTERED


def trace(lock: Lock, asked: Iterable[str]) -> Record:
    """Everything that made the outs `asked` and how it compares with the workspace, as a JSON-like value.

    Returns:
        `stages` by name, each before the stages it took something from; `altered`, `missing` and `older`: lists of
        sentences on what in the workspace is not as recorded, not there, or newer than the record.
    """
    workspace, runs = Workspace(), read_runs()
    params = load_yaml(PARAMS_FILE)
    declared = declared_stages()
    stages: dict[str, Record] = {}
    pending = [lock.maker[out] for out in asked]
    while pending:
        name = pending.pop(0)
        if name in stages:
            continue
        stages[name] = stage_record(name, lock, declared, workspace, runs)
        stages[name]["older"] = [
            *changed_code(name, stages[name]["code"]),
            *changed_settings(name, stages[name]["params"], params),
            *changed_declaration(name, stages[name], declared.get(name)),
            *changed_sources(name, stages[name]["inputs"]),
        ]
        pending += [entry["made_by"] for entry in stages[name]["inputs"] if entry["made_by"]]
    return {"asked": list(asked), "stages": stages, **findings(stages)}


def stage_record(
    name: str, lock: Lock, declared: Mapping[str, Record], workspace: Workspace, runs: list[Record]
) -> Record:
    """One stage as `dvc.lock` has it, with the state of each of its files and the run that wrote its outs."""
    stage = lock.stages[name]
    outs = [entry_of(out, workspace) for out in stage.get("outs", [])]
    deps = stage.get("deps", [])
    inputs = [entry_of(dep, workspace) for dep in deps if not is_manifest(dep["path"])]
    folders = [entry["path"] for entry in inputs if lock.out_with(entry["path"]) is None]
    # A folder that several stages write to, such as data/sources: what they have written there.
    below = [out for out in lock.maker if any(out.startswith(f"{folder}/") for folder in folders)]
    inputs += [entry_of({"path": out, "md5": lock.hash_of[out]}, workspace) | {"within": True} for out in below]
    manifest = next((dep for dep in deps if is_manifest(dep["path"])), None)
    text = recorded_code(manifest, runs) if manifest else None
    for entry in inputs:
        out = lock.out_with(entry["path"])
        entry["made_by"] = lock.maker[out] if out else None
        entry["unrecorded_maker"] = None if out else declared_maker(entry["path"], declared)
        if out and is_earlier(entry, out, lock, workspace):
            entry["state"] = EARLIER
    settings = (stage.get("params") or {}).get(str(PARAMS_FILE)) or {}
    return {
        "cmd": stage["cmd"],
        "params": settings,
        "code": None if text is None else [code_entry(*line.split(" ", 1)) for line in text.splitlines()],
        "inputs": inputs,
        "outs": outs,
        "origin": origin_of(settings),
        "run": run_that_made({out["path"]: out["md5"] for out in outs}, runs),
    }


def is_manifest(path: str) -> bool:
    return path.startswith(f"{MANIFESTS}/")


def recorded_code(manifest: Mapping[str, Any], runs: list[Record]) -> str | None:
    """The manifest of the hash that `dvc.lock` has: of the workspace, the log of runs, or a commit; else None."""
    path, md5 = Path(manifest["path"]), manifest.get("md5")
    here = [path.read_text(encoding="utf-8")] if path.is_file() else []
    logged = [run["code"] for run in reversed(runs) if isinstance(run.get("code"), str)]
    for text in (*here, *logged):
        if hashlib.md5(text.encode()).hexdigest() == md5:
            return text
    return next((text for text in committed_texts(path) if hashlib.md5(text.encode()).hexdigest() == md5), None)


def committed_texts(path: Path) -> Iterator[str]:
    """What a file held in each commit that changed it, newest first; nothing without Git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, check=False)
        return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""

    try:
        for commit in git("log", "--all", "--format=%H", "--", str(path)).split():
            yield git("show", f"{commit}:./{path}")
    except FileNotFoundError:
        return


def code_entry(recorded: str, path: str) -> Record:
    """A line of a manifest, and whether the file is as it was but for remarks."""
    file = Path(path)
    state = MISSING if not file.is_file() else SAME if code_hash(file) == recorded else ALTERED
    return {"path": path, "md5": recorded, "state": state}


def entry_of(recorded: Mapping[str, Any], workspace: Workspace) -> Record:
    path, md5 = recorded["path"], recorded.get("md5")
    return {"path": path, "md5": md5, "state": workspace.state(path, md5)}


def declared_maker(path: str, declared: Mapping[str, Record]) -> str | None:
    """The stage that makes `path` by `dvc.yaml`; None if it is raw data, for instance."""
    makers = ((name, out) for name, stage in declared.items() for out in stage["outs"])
    return next((name for name, out in makers if path == out or path.startswith(f"{out}/")), None)


def is_earlier(entry: Mapping[str, Any], out: str, lock: Lock, workspace: Workspace) -> bool:
    """True if a stage read another version of `entry` than the one in `out` as `dvc.lock` has it now.

    Of a file within a folder the lock has no hash of its own: it is compared if the folder here is as recorded.
    """
    if entry["path"] == out:
        return entry["md5"] != lock.hash_of[out]
    return entry["state"] == ALTERED and workspace.hash_of(out) == lock.hash_of[out]


def origin_of(settings: Mapping[str, Any]) -> str | None:
    """Where a stage got what no other stage made, from its settings as recorded; None of a stage that brings nothing.

    Those that do record single entries: `sources.hub.hh.dataset: …`, `prepare_base.files.base.path: …`.
    """
    for key, value in settings.items():
        if key.startswith("fetch_model."):
            return f"Hub model {value['model']} at revision {value['revision']}"
    entries = [key.split(".")[:3] for key in settings if key.startswith(("sources.", "prepare_base."))]
    if not entries:
        return None
    section, kind, name = entries[0]
    found = dotted({key: value for key, value in settings.items() if key.startswith(f"{section}.{kind}.{name}")})
    found = {key.removeprefix(f"{section}.{kind}.{name}."): value for key, value in found.items()}
    if kind == "hub":
        what = "dataset" if section == "sources" else "model"
        where = [f"{key} {found[key]}" for key in ("config", "data_dir", "hub_split") if found.get(key)]
        return ", ".join([f"Hub {what} {found[what]} at revision {found['revision']}", *where])
    if kind == "files":
        return f"local: {found['path']}"
    return "new random weights" if section == "prepare_base" else f"made by the task {found['task']}"


def declared_stages() -> dict[str, Record]:
    """Command, deps and outs of each stage of `dvc.yaml`, with its matrix and the values of `params.yaml` put in.

    Raises:
        StageError: DVC cannot read the graph.
    """
    from dvc.dependency import ParamsDependency
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    try:
        with Repo() as repo:
            return {
                str(stage.name): {
                    "cmd": " ".join(words_of_command(stage.cmd)),
                    "deps": {dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)},
                    "outs": {out.def_path for out in stage.outs},
                }
                for stage in repo.index.stages
                if isinstance(stage, PipelineStage) and stage.cmd
            }
    except DvcException as error:
        raise StageError(f"{GRAPH_FILE}: {error}") from None


def words_of_command(cmd: str | list[str]) -> list[str]:
    """Of a stage's command, or of its several."""
    return (cmd if isinstance(cmd, str) else " ".join(cmd)).split()


def changed_code(name: str, code: list[Record] | None) -> list[str]:
    if code is None:
        return [f"the code that {name} ran is not recorded here: neither in a commit nor in the log of runs"]
    changed = [entry["path"] for entry in code if entry["state"] == ALTERED]
    gone = [entry["path"] for entry in code if entry["state"] == MISSING]
    return [
        *([f"{name} ran before these changed: {', '.join(changed)}"] if changed else []),
        *([f"{name} ran when these were still there: {', '.join(gone)}"] if gone else []),
    ]


def changed_settings(name: str, recorded: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    before, now = dotted(recorded), dotted(held(params, recorded))
    absent = object()
    return [
        f"{name} was made with {key} {as_yaml(before.get(key))}, and {PARAMS_FILE} has {as_yaml(now.get(key))}"
        for key in {**before, **now}
        if before.get(key, absent) != now.get(key, absent)
    ]


def changed_declaration(name: str, record: Mapping[str, Any], declared: Mapping[str, Any] | None) -> list[str]:
    if declared is None:
        return [f"{GRAPH_FILE} has no stage {name} any more"]
    faults = []
    if words_of_command(record["cmd"]) != words_of_command(declared["cmd"]):
        faults.append(f"the command of {name} in {GRAPH_FILE} is another one")
    recorded = {entry["path"] for entry in record["inputs"] if "within" not in entry}
    data = {dep for dep in declared["deps"] if not is_manifest(dep)}
    for paths, what in ((data - recorded, "without"), (recorded - data, "still with")):
        faults += [f"{name} ran {what} these deps: {', '.join(sorted(paths))}"] if paths else []
    return faults


def changed_sources(name: str, inputs: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the chain ends at although a stage makes it, and what no stage makes and has changed since."""
    ends = [entry for entry in inputs if entry["made_by"] is None]
    unrecorded = [
        f"{entry['path']}: {entry['unrecorded_maker']} makes it, but {LOCK_FILE} has no run of that stage"
        for entry in ends
        if entry["unrecorded_maker"]
    ]
    changed = [
        f"{name} ran before {entry['path']} changed"
        for entry in ends
        if entry["state"] == ALTERED and not entry["unrecorded_maker"]
    ]
    return unrecorded + changed


def held(params: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """What params.yaml has at dotted keys, as far as it has something there."""
    absent, found = object(), {}
    for key in keys:
        value: Any = params
        for part in key.split("."):
            value = value.get(part, absent) if isinstance(value, Mapping) else absent
        if value is not absent:
            found[key] = value
    return found


def dotted(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Dotted key → value, below every non-empty mapping."""
    leaves = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        leaves |= dotted(value, f"{section}{key}.") if nested else {f"{section}{key}": value}
    return leaves


def as_yaml(value: Any) -> str:
    """A setting as YAML writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def findings(stages: Mapping[str, Record]) -> dict[str, list[str]]:
    """What is not as recorded, each once: files of data and models; what is not there; what the record is behind."""
    altered: dict[str, None] = {}
    missing: dict[str, None] = {}
    older: dict[str, None] = {}
    for name, stage in stages.items():
        for entry in [*stage["outs"], *stage["inputs"]]:
            if entry["state"] == ALTERED and entry.get("made_by", name):
                altered[f"{entry['path']} was altered since {entry.get('made_by', name)} ran"] = None
            elif entry["state"] == ALTERED and entry["unrecorded_maker"]:
                altered[f"{entry['path']} was altered since {name} read it"] = None
            elif entry["state"] == EARLIER:
                text = f"{name} was made from an earlier {entry['path']} than {entry['made_by']} has made since"
                older[text] = None
            elif entry["state"] == MISSING:
                missing[entry["path"]] = None
        older |= dict.fromkeys(stage["older"])
    whole = [path for path in missing if not any(path.startswith(f"{other}/") for other in missing)]
    return {"altered": list(altered), "missing": whole, "older": list(older)}
