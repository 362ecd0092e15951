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

from stages.code_manifest import manifests
from tests.pipeline.graph import FIRST, MANIFESTS, ROOT, all_instances, is_code, load_graph, outs_of, paths

TABLE = ROOT / "tests/pipeline/staleness.md"
RAW_DATA = "data/raw/none"
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

Each row is one change, each ● a stage that `dvc status` then calls changed: DVC runs it again. The stages after it
follow only if what it writes has other bytes. A section of params.yaml stands for each of its keys: stages read whole
sections. The first stage takes about two seconds and writes the manifests of code, on which the others depend. A file
that marks the first stage alone cannot change an out (stages/lib/operations), or belongs to a tool or to the first
stage itself. Made by `python -m tests.pipeline.staleness --write`; a test asks DVC again, and compares
with the imports in the source and with what each stage reads when it runs.

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
    shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
    write_placeholders(folder)
    write_manifests(folder)


def write_manifests(folder: Path) -> dict[str, str]:
    """What the first stage writes, from the code in `folder`, in which the process runs. Returns what has changed."""
    changed = {}
    for name, text in manifests().items():
        file = folder / MANIFESTS / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            changed[name] = text
    return changed


def write_placeholders(folder: Path) -> None:
    """A file for each out and each dep below one; an out with deps below it, or without a suffix, is a folder."""
    stages = all_instances(load_graph())
    outs = [out for stage in stages.values() for out in outs_of(stage) if not is_code(out)]
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
        more = "\nCHANGED = True\n" if file.suffix == ".py" else "\n"
        changes[file.relative_to(folder).as_posix()] = (file, file.read_text(encoding="utf-8") + more)
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


def stale_one_by_one(folder: Path) -> dict[str, set[str]]:
    """Row of the table → the stages that DVC calls changed after this change alone."""
    with fresh_copy(folder) as repo:
        changes = changes_of(folder) | remarks_of(folder)
        return {row: asked(repo, folder, {file: text}) for row, (file, text) in changes.items()}


def stale_by_parts(folder: Path) -> dict[str, set[str]]:
    """The same with few questions to DVC: which manifests a change of code writes is seen without it."""
    with fresh_copy(folder) as repo:
        changes = changes_of(folder) | remarks_of(folder)
        code = {row: edit for row, edit in changes.items() if row.startswith("stages/") and edit[0].suffix == ".py"}
        answers = {row: asked(repo, folder, dict([edit])) for row, edit in changes.items() if row not in code}
        stale_with = {}
        for name, text in manifests().items():
            stale_with[name] = asked(repo, folder, {folder / MANIFESTS / f"{name}.txt": text + "more\n"}, again=False)
        for row, (file, text) in code.items():
            with edited({file: text}):
                changed = write_manifests(folder)
            write_manifests(folder)
            answers[row] = {FIRST}.union(*(stale_with[name] for name in changed))
        assert asked(repo, folder, dict(remarks_of(folder).values())) == {FIRST}
        return {row: answers[row] for row in changes}


def asked(repo: Any, folder: Path, edits: dict[Path, str], *, again: bool = True) -> set[str]:
    """The stages that `dvc status` calls changed while these files hold these texts.

    Args:
        again: whether the first stage has written its manifests by then.
    """
    with edited(edits):
        if again:
            write_manifests(folder)
        stale = set(repo.status())
    write_manifests(folder)
    return stale


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
