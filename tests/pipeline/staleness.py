"""Which stages each change makes stale, asked of DVC itself.

    python -m tests.pipeline.staleness            print the table
    python -m tests.pipeline.staleness --write    bring tests/pipeline/staleness.md up to date

In a copy of the project in which every stage is up to date (its data and models are placeholders: `dvc status` looks at
hashes alone) one thing is edited, DVC is asked, the edit is undone, and so on with the next.
"""

import argparse
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from copy import deepcopy
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages import code_manifest
from stages.code_manifest import manifests
from stages.lib.command import params as command_params
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.operations import code_closure
from stages.lib.operations.code_closure import manifest_of
from stages.lib.settings.declaration import block
from stages.lib.settings.ensemble_member import EnsembleMember
from stages.lib.settings.fetch_model import HubModel
from stages.lib.settings.pass_rates import PassRates
from stages.lib.settings.prepare_base import ModelOfFolder, ModelOfHub
from stages.lib.settings.ref_logprobs import RefLogprobsUnpaired
from stages.lib.settings.rewards import FunctionReward
from stages.lib.settings.sample_pairs import SamplePairs
from stages.lib.settings.sections import default_params
from stages.lib.settings.sources import FileSource, HubSource
from stages.lib.settings.train_unpaired import TrainUnpaired
from tests.pipeline.graph import FIRST, MANIFESTS, ROOT, all_instances, is_code, load_graph, outs_of, paths

TABLE = ROOT / "tests/pipeline/staleness.md"
RAW_DATA = {"own": "data/raw/own.jsonl", "exam": "data/raw/exam.jsonl"}  # of the sources of files
RAW_MODEL = "data/raw/model"
REWARD = "rewards/example.py"  # called by train_grpo
# What no stage depends on: how it is started, where it came from, how it is tested and shown.
IN_NO_DEPS = (
    *("runtime.yaml", "README.md", "Makefile", "pyproject.toml", "requirements.lock", "profiles/hh-local.yaml"),
    "tests/lib/objectives/test_preference_losses.py",
)
SECTION = "params.yaml: "
COMMENT = f"{SECTION}a comment"
REMARK = ": a comment"  # the end of the row of a Python file in which one is added
HEAD = """\
# What a change makes stale

Each row is one change, each ● a stage that `dvc status` then calls changed: DVC runs it again; of a group of stages a
name in place of the ● says which one alone. The stages after it follow only if what it writes has other bytes. The
project has a source and a model to start from in each group that there is. A section of params.yaml stands for each of
its keys but for those that have rows of their own. The first stage takes about two seconds and writes the manifests of
code, on which the others depend. A file that marks the first stage alone cannot change an out (stages/lib/operations),
or belongs to a tool or to the first stage itself. Made by `python -m tests.pipeline.staleness --write`; a test asks DVC
again, and compares with the imports in the source and with what each stage reads when it runs.

"""


def copy_of_project(folder: Path) -> None:
    """What DVC looks at, with placeholders for all outs, every stage up to date."""
    for name in ("stages", "rewards", *(file for file in IN_NO_DEPS if (ROOT / file).is_file())):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(as_yaml(settings_of_copy()), encoding="utf-8")
    write_placeholders(folder)
    (folder / MANIFESTS).mkdir()
    for file, text in manifest_files(folder).items():
        file.write_text(text, encoding="utf-8")


def manifest_files(folder: Path) -> dict[Path, str]:
    """The files that the first stage writes, from the code in `folder`, in which the process runs."""
    return {folder / MANIFESTS / f"{name}.txt": text for name, text in manifests().items()}


def write_placeholders(folder: Path) -> None:
    """A file for each out and each dep below one; an out with deps below it, or without a suffix, is a folder."""
    stages = instances_of_copy()
    outs = [out for stage in stages.values() for out in outs_of(stage) if not is_code(out)]
    deps = [dep for stage in stages.values() for dep in paths(stage["deps"]) if not is_code(dep) and "$" not in dep]
    for path in (*outs, *deps):
        target = folder / path
        if path in outs and not target.suffix:
            target = target / "placeholder"
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.write_text(f"{path}\n")


@contextlib.contextmanager
def each_yaml_text_parsed_once() -> Iterator[None]:
    """DVC parses params.yaml once for every stage and dvc.lock at every question: most of the time of an answer.

    So do we for every manifest; and to look up a key, DVC walks through all of params.yaml.
    """
    from dvc.dependency import param
    from dvc.utils.serialize import _yaml

    parse, lookup = _yaml.parse_yaml, param.dpath

    @functools.cache
    def parse_once(text: str, path: str, typ: str) -> Any:
        return parse(text, path, typ)

    @functools.cache
    def load_once(_: str, path: Path) -> Any:
        return load_yaml(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_yaml, "parse_yaml", lambda text, path, typ="safe": deepcopy(parse_once(text, path, typ)))
        patch.setattr(param, "dpath", SimpleNamespace(get=value_at, merge=lookup.merge, search=lookup.search))
        for module in (code_manifest, command_params):
            patch.setattr(module, "load_yaml", lambda path: deepcopy(load_once(path.read_text(encoding="utf-8"), path)))
        yield


def value_at(settings: Any, key: str, separator: str) -> Any:
    """The value of a dotted key without wildcards. Raises KeyError if there is none."""
    for part in key.split(separator):
        settings = settings[part] if isinstance(settings, dict) else {}[part]
    return settings


@contextlib.contextmanager
def files_read_once(edited: set[Path]) -> Iterator[None]:
    """Files of code are looked for and read once, but for those being edited: most of the time of a manifest."""
    read_source = code_closure.read_source
    read_once = functools.cache(read_source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_closure, "_path_of", functools.cache(code_closure._path_of))
        patch.setattr(code_closure, "read_source", lambda file: (read_source if file in edited else read_once)(file))
        yield


def settings_of_copy() -> dict[str, Any]:
    """The default settings and an entry in each group of stages that has none, so that all groups are looked at."""
    params = default_params()
    params["sources"]["files"] = {
        "own": block(FileSource, path=RAW_DATA["own"]),
        "exam": block(FileSource, path=RAW_DATA["exam"], split="test"),
    }
    params["sources"]["hub"] = {"far": block(HubSource)}
    params["prepare_base"]["files"] = {"given": block(ModelOfFolder, path=RAW_MODEL)}
    params["prepare_base"]["hub"] = {"far": block(ModelOfHub)}
    params["fetch_model"] = {"judge": block(HubModel)}
    params["ensemble_member"] = {"first": block(EnsembleMember)}
    params["sample_pairs"] = {"first": block(SamplePairs)}
    params["pass_rates"] = {"first": block(PassRates)}
    params["train_grpo"]["grpo"]["rewards"] = {"own": block(FunctionReward)}
    params["prepare_data"]["kinds"].append("unpaired")
    params["ref_logprobs_unpaired"] = {"sft": block(RefLogprobsUnpaired)}
    params["train_unpaired"] = {"kto": block(TrainUnpaired)}
    return params


def instances_of_copy() -> dict[str, dict[str, Any]]:
    return all_instances(load_graph(), settings_of_copy())


# Row of the table, a section of params.yaml or a key of it → the key that is edited there, in each entry where it holds
# a *, and its value then.
EDITED_KEYS: dict[str, tuple[str, Any]] = {
    "seed": ("seed", 18),
    "trust_remote_code": ("trust_remote_code", True),
    "kernels": ("kernels", "fastest"),
    "sources.files": ("sources.files.*.max_rows", 100),
    "sources.files.own.weight": ("sources.files.own.weight", 2.0),
    "sources.hub": ("sources.hub.*.max_rows", 100),
    "sources.hub.far.weight": ("sources.hub.far.weight", 2.0),
    "sources.tasks": ("sources.tasks.*.sft_rows", 100),
    "sources.tasks.film_reviews.weight": ("sources.tasks.film_reviews.weight", 2.0),
    "prepare_data": ("prepare_data.test_fraction", 0.5),
    "prepare_data.kinds": ("prepare_data.kinds", ["unpaired", "prompts", "preference", "sft"]),
    "prepare_base.scratch": ("prepare_base.scratch.*.layers", 4),
    "prepare_base.files": ("prepare_base.files.*.dtype", "bfloat16"),
    "prepare_base.hub": ("prepare_base.hub.*.dtype", "bfloat16"),
    "fetch_model": ("fetch_model.*.revision", "1" * 40),
    "tokenize_data": ("tokenize_data.max_length", 100),
    "train_sft": ("train_sft.*.epochs", 7.0),
    "train_rm": ("train_rm.*.epochs", 7.0),
    "ensemble_member": ("ensemble_member.*.weight", 2.0),
    "sample_pairs": ("sample_pairs.*.temperature", 0.5),
    "pass_rates": ("pass_rates.*.temperature", 0.5),
    "ref_logprobs": ("ref_logprobs.*.precision", "bf16"),
    "train_dpo": ("train_dpo.*.epochs", 7.0),
    "ref_logprobs_unpaired": ("ref_logprobs_unpaired.*.mismatched", False),
    "train_unpaired": ("train_unpaired.*.epochs", 7.0),
    "train_ppo": ("train_ppo.*.epochs", 7),
    "train_grpo": ("train_grpo.*.epochs", 7),
    "evaluate": ("evaluate.temperature", 0.5),
    "score_samples": ("score_samples.precision", "bf16"),
    "evaluate_rm": ("evaluate_rm.*.precision", "bf16"),
}


def edited_settings(params: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The settings with another value of a dotted key; `*` in it stands for each entry of a mapping."""
    changed = deepcopy(params)
    mappings, parts = [changed], key.split(".")
    for part in parts[:-1]:
        mappings = [below for mapping in mappings for below in (mapping.values() if part == "*" else [mapping[part]])]
    for mapping in mappings:
        assert mapping[parts[-1]] != value, f"params.yaml: {key} is {value} already"
        mapping[parts[-1]] = value
    assert mappings, f"params.yaml: nothing stands at {key}"
    return changed


def as_yaml(settings: dict[str, Any]) -> str:
    stream = StringIO()
    YAML(typ="safe", pure=True).dump(settings, stream)
    return stream.getvalue()


def changes_of(folder: Path) -> dict[str, tuple[Path, str]]:
    """Row of the table → the file to edit, and its text then."""
    file, settings = folder / "params.yaml", settings_of_copy()
    changes = {
        f"{SECTION}{row}": (file, as_yaml(edited_settings(settings, key, value)))
        for row, (key, value) in EDITED_KEYS.items()
    }
    changes[COMMENT] = (file, as_yaml(settings) + "# A comment.\n")
    code = sorted(path for path in (folder / "stages").rglob("*") if path.is_file())
    for path in [*code, *(folder / name for name in (REWARD, *RAW_DATA.values(), RAW_MODEL, *IN_NO_DEPS))]:
        more = "\nCHANGED = True\n" if path.suffix == ".py" else "\n"
        changes[path.relative_to(folder).as_posix()] = (path, path.read_text(encoding="utf-8") + more)
    return changes


def remarks_of(folder: Path) -> dict[str, tuple[Path, str]]:
    """Row of the table → a Python file of stages/, and its text with one more comment."""
    files = [file for file in sorted((folder / "stages").rglob("*.py")) if file.stat().st_size]
    return {
        f"{file.relative_to(folder).as_posix()}{REMARK}": (file, file.read_text(encoding="utf-8") + "# A comment.\n")
        for file in files
    }


@contextlib.contextmanager
def fresh_copy(folder: Path) -> Iterator[Any]:
    """The copy of the project as a DVC repository in which every stage is up to date."""
    from dvc.repo import Repo, lock_repo

    before = Path.cwd()
    os.chdir(folder)
    copy_of_project(folder)
    try:
        with Repo.init(str(folder), no_scm=True) as repo, each_yaml_text_parsed_once():
            repo.commit(force=True)
            with lock_repo(repo):  # dvc.yaml and dvc.lock stay as they are, so DVC reads them once
                assert repo.status() == {}, "the copy is not up to date to begin with"
                yield repo
                assert repo.status() == {}, "an edit was not undone"
    finally:
        os.chdir(before)


def stale_by_parts(folder: Path) -> dict[str, set[str]]:
    """Row of the table → the stages that DVC calls changed after this change alone.

    Of code it is asked once for each manifest: which of them a change writes is seen without it.
    """
    with fresh_copy(folder) as repo:
        changes = changes_of(folder) | remarks_of(folder)
        code = {row: edit for row, edit in changes.items() if row.startswith("stages/") and edit[0].suffix == ".py"}
        being_edited: set[Path] = set()
        with files_read_once(being_edited):
            answers = {}
            for row, (file, text) in changes.items():
                if row in code:
                    continue
                being_edited.add(file.relative_to(folder))
                answers[row] = asked(repo, folder, {file: text})
                being_edited.clear()
            stale_with = {
                file.stem: asked(repo, folder, {file: text + "more\n"}, again=False)
                for file, text in manifest_files(folder).items()
            }
            before = manifests_of_code(stale_with)
            read_for = {name: {*code_closure.closure([f"stages/{name}.py"])} for name in stale_with}
            for row, (file, text) in code.items():
                own = file.relative_to(folder)
                being_edited.add(own)
                with edited({file: text}):
                    after = manifests_of_code(name for name in stale_with if own.as_posix() in read_for[name])
                being_edited.clear()
                answers[row] = {FIRST}.union(*(stale_with[name] for name in after if after[name] != before[name]))
        assert asked(repo, folder, dict(remarks_of(folder).values())) == {FIRST}
        return {row: answers[row] for row in changes}


def manifests_of_code(names: Iterable[str]) -> dict[str, str]:
    """Script → its manifest, without the files that settings choose."""
    return {name: manifest_of(f"stages/{name}.py") for name in names}


def asked(repo: Any, folder: Path, edits: dict[Path, str], *, again: bool = True) -> set[str]:
    """The stages that `dvc status` calls changed while these files hold these texts.

    Args:
        again: whether the first stage has written its manifests by then.
    """
    with edited(edits), edited(manifest_files(folder) if again else {}):
        return set(repo.status())


@contextlib.contextmanager
def edited(edits: dict[Path, str]) -> Iterator[None]:
    before = {file: file.read_bytes() for file in edits}
    for file, text in edits.items():
        file.write_text(text, encoding="utf-8")
    try:
        yield
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def table(answers: dict[str, set[str]]) -> str:
    """Markdown; one column for all instances of a group, with the names of those that are stale alone."""
    of_column = {
        name: [each for each in instances_of_copy() if each.split("@")[0] == name] for name in load_graph()["stages"]
    }
    lines = [f"| change | {' | '.join(of_column)} |", f"|---|{':-:|' * len(of_column)}"]
    for change, stale in answers.items():
        marks = [marked(instances, stale) for instances in of_column.values()]
        lines.append(f"| `{change}` | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def marked(instances: list[str], stale: set[str]) -> str:
    found = [name for name in instances if name in stale]
    return "●" if found == instances else ", ".join(name.partition("@")[2] for name in found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Which stages each change makes stale.")
    parser.add_argument("--write", action="store_true", help="write tests/pipeline/staleness.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = HEAD + table(stale_by_parts(Path(folder).resolve()))
    if arguments.write:
        TABLE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
