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
import re
import shutil
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.pipeline.closure import ROOT, is_code, load_graph
from tests.pipeline.test_graph import all_instances, outs_of, paths

TABLE = ROOT / "tests/pipeline/staleness.md"
RAW_DATA = "data/raw/none"
# What no stage depends on: how it is started, where it came from, how it is tested and shown.
IN_NO_DEPS = (
    *("runtime.yaml", "README.md", "Makefile", "pyproject.toml", "requirements.lock", "profiles/default.yaml"),
    "tests/lib/test_dpo_loss.py",
)
SECTION = "params.yaml: "
COMMENT = f"{SECTION}a comment"
HEAD = """\
# What a change makes stale

Each row is one change, each ● a stage that `dvc status` then calls changed: DVC runs it again. The stages after it
follow only if what it writes has other bytes. A section of params.yaml stands for each of its keys: stages read whole
sections. Made by `python -m tests.pipeline.staleness --write`; a test asks DVC again, and compares with the imports in
the source and with what each stage reads when it runs.

"""


def copy_of_project(folder: Path) -> None:
    """What DVC looks at, with placeholders for all outs, every stage up to date."""
    for name in ("stages", *(file for file in IN_NO_DEPS if (ROOT / file).is_file())):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copyfile(ROOT / "profiles/default.yaml", folder / "params.yaml")
    write_placeholders(folder)


def write_placeholders(folder: Path) -> None:
    """A file for each out and each dep below one; an out with deps below it, or without a suffix, is a folder."""
    stages = all_instances(load_graph())
    outs = [out for stage in stages.values() for out in outs_of(stage)]
    deps = [dep for stage in stages.values() for dep in paths(stage["deps"]) if not is_code(dep) and "$" not in dep]
    for path in (*outs, *deps, "data/prepared/sft/train.jsonl", RAW_DATA):
        target = folder / path
        if path in outs and not target.suffix:
            target = target / "placeholder"
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.write_text(f"{path}\n")


@contextlib.contextmanager
def each_yaml_text_parsed_once() -> Iterator[None]:
    """DVC parses params.yaml once for every stage and dvc.lock at every question: most of the time of an answer."""
    from dvc.utils.serialize import _yaml

    parse = _yaml.parse_yaml

    @functools.cache
    def parse_once(text: str, path: str, typ: str) -> Any:
        return parse(text, path, typ)

    _yaml.parse_yaml = lambda text, path, typ="safe": deepcopy(parse_once(text, path, typ))
    try:
        yield
    finally:
        _yaml.parse_yaml = parse


def params_with_changes(text: str, keys: list[str], graph: str) -> str:
    """The text of params.yaml with one value of each of these sections changed, one that `graph` does not hold."""
    lines, pending, section = [], list(keys), ""
    for line in text.splitlines():
        top = re.match(r"(\w+):", line)
        section = top[1] if top else section
        value = re.match(r"(  )?(\w+): +[^#\s]", line)
        if value and section in pending and (top or f"${{{section}.{value[2]}}}" not in graph):
            pending.remove(section)
            line = f"{value[1] or ''}{value[2]}: another value"
        lines.append(line)
    if pending:
        raise ValueError(f"params.yaml: no value to change in {pending}")
    return "\n".join(lines) + "\n"


def changes_of(folder: Path) -> dict[str, tuple[Path, str]]:
    """Row of the table → the file to edit, and its text then."""
    params = folder / "params.yaml"
    text, graph = params.read_text(encoding="utf-8"), (folder / "dvc.yaml").read_text(encoding="utf-8")
    keys = YAML(typ="safe", pure=True).load(text)
    changes = {f"{SECTION}{key}": (params, params_with_changes(text, [key], graph)) for key in keys}
    changes[COMMENT] = (params, text + "# A comment.\n")
    code = sorted(file for file in (folder / "stages").rglob("*") if file.is_file())
    for file in [*code, *(folder / name for name in (RAW_DATA, *IN_NO_DEPS))]:
        changes[file.relative_to(folder).as_posix()] = (file, file.read_text(encoding="utf-8") + "\n")
    return changes


@contextlib.contextmanager
def fresh_copy(folder: Path) -> Iterator[Any]:
    """The copy of the project as a DVC repository in which every stage is up to date."""
    from dvc.repo import Repo, lock_repo

    before = Path.cwd()
    copy_of_project(folder)
    os.chdir(folder)
    try:
        with Repo.init(str(folder), no_scm=True) as repo, each_yaml_text_parsed_once():
            repo.commit(force=True)
            with lock_repo(repo):  # dvc.yaml and dvc.lock stay as they are, so DVC reads them once
                assert repo.status() == {}, "the copy is not up to date to begin with"
                yield repo
                assert repo.status() == {}, "an edit was not undone"
    finally:
        os.chdir(before)


def stale_one_by_one(folder: Path) -> dict[str, set[str]]:
    """Row of the table → the stages that DVC calls changed after this change alone."""
    with fresh_copy(folder) as repo:
        return {row: set(asked(repo, {file: text})) for row, (file, text) in changes_of(folder).items()}


def stale_at_once(folder: Path) -> dict[str, set[str]]:
    """The same from one question after all changes: DVC names what has changed of each stage."""
    with fresh_copy(folder) as repo:
        changes = changes_of(folder)
        edits = dict(changes.values())
        sections = [row.removeprefix(SECTION) for row in changes if row.startswith(SECTION) and row != COMMENT]
        graph = (folder / "dvc.yaml").read_text(encoding="utf-8")
        text = params_with_changes(edits[folder / "params.yaml"], sections, graph)  # on top of the comment
        edits[folder / "params.yaml"] = text
        answers: dict[str, set[str]] = {row: set() for row in changes}
        for stage, reasons in asked(repo, edits).items():
            (changed,) = (reason["changed deps"] for reason in reasons)
            for path, how in changed.items():
                for row in [f"{SECTION}{key}" for key in how] if isinstance(how, dict) else [path]:
                    answers[row].add(stage)
    return answers


def asked(repo: Any, edits: dict[Path, str]) -> dict[str, list[Any]]:
    """What `dvc status` says while these files hold these texts."""
    before = {file: file.read_bytes() for file in edits}
    for file, text in edits.items():
        file.write_text(text, encoding="utf-8")
    try:
        return repo.status()
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def table(answers: dict[str, set[str]]) -> str:
    """Markdown; one column for all instances of a matrix, which must agree."""
    graph = load_graph()
    instances = list(all_instances(graph))
    columns = list(graph["stages"])
    lines = [f"| change | {' | '.join(columns)} |", f"|---|{':-:|' * len(columns)}"]
    for change, stale in answers.items():
        marks = []
        for name in columns:
            of_stage = {instance in stale for instance in instances if instance.split("@")[0] == name}
            assert len(of_stage) == 1, f"{change}: some instances of {name} are stale and some not"
            marks.append("●" if of_stage.pop() else "")
        lines.append(f"| `{change}` | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Which stages each change makes stale.")
    parser.add_argument("--write", action="store_true", help="write tests/pipeline/staleness.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = HEAD + table(stale_one_by_one(Path(folder).resolve()))
    if arguments.write:
        TABLE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
