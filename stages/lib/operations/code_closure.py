"""The code that a stage runs: its script, every module of `stages` that it imports, directly or not, and templates.

A manifest lists it, a line "hash path" for each file, and each stage of dvc.yaml depends on its own manifest alone. The
hash covers what can change a result: the source without comments, docstrings and blank lines, cut out by their place in
the text (`ast.unparse` writes another text in each version of Python).
"""

import ast
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from stages.lib.command.errors import StageError

# A package whose modules by contract cannot change a byte of an out: the closure goes through it and lists none of it.
LEFT_OUT = "stages/lib/operations/"
MANIFESTS = Path("code_manifests")
PROJECT = Path(__file__).resolve().parents[3]
PACKAGE = "stages"
REWARDS = "rewards"  # the user's own functions, which the manifests of the stages that call them list
# A comment, or a string as a whole, so that a # within one is none. No string of ours holds quotes of its own kind in
# braces, which Python before 3.12 does not read either.
_COMMENT_OR_STRING = re.compile(
    r"#[^\n]*"
    r'|"""(?:\\.|[^\\])*?"""'
    r"|'''(?:\\.|[^\\])*?'''"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'(?:\\.|[^'\\\n])*'",
    re.DOTALL,
)


class Source(NamedTuple):
    """What is to be known of one Python file."""

    hash: str  # of what can change a result
    imports: tuple[str, ...]  # names that may be modules, dotted
    texts: frozenset[str]  # its strings without white space, one of which may name a template


def manifest_of(script: str, root: Path = Path()) -> str:
    """The manifest of a stage.

    Args:
        script: path of the stage's script below `root`, such as "stages/train_rm.py".
        root: the project's top folder.
    """
    return lines_of([file for file in closure([script], root) if not file.startswith(LEFT_OUT)], root)


def lines_of(files: list[str], root: Path = Path()) -> str:
    """The lines of a manifest for these files below `root`."""
    return "".join(f"{code_hash(root / file)} {file}\n" for file in files)


@cache
def running_code() -> str:
    """The code that this process runs, listed as in a manifest, as it was when this was first called.

    What manifests leave out is listed here, too: a run resumes, and runs together with others, only with the same code.
    """
    modules = [module for name, module in list(sys.modules.items()) if name == "__main__" or _is_ours(name)]
    files = [Path(file).resolve() for module in modules if (file := getattr(module, "__file__", None))]
    roots = [file.relative_to(PROJECT).as_posix() for file in files if file.is_relative_to(PROJECT / PACKAGE)]
    return lines_of(closure(roots, PROJECT), PROJECT)


def running_hash() -> str:
    """SHA-256 of `running_code`."""
    return hashlib.sha256(running_code().encode()).hexdigest()


@cache
def running_manifest() -> str | None:
    """The manifest of the stage that this process was started as, or None if it was started as something else.

    With the reward functions, and what they read, that the one on disk lists: settings choose them, not the code.
    """
    name = _own_name()
    if not name:
        return None
    own, recorded = manifest_of(f"{PACKAGE}/{name.replace('.', '/')}.py", PROJECT), MANIFESTS / f"{name}.txt"
    listed = recorded.read_text(encoding="utf-8").splitlines() if recorded.is_file() else []
    files = [line.partition(" ")[2] for line in listed]
    return with_files(own, closure(file for file in files if file.startswith(f"{REWARDS}/") and Path(file).is_file()))


def with_files(manifest: str, files: Iterable[str], root: Path = Path()) -> str:
    """A manifest that lists these files below `root`, too, behind its own."""
    own = {line.partition(" ")[2] for line in manifest.splitlines()}
    return manifest + lines_of([file for file in files if file not in own and not file.startswith(LEFT_OUT)], root)


def _own_name() -> str:
    """The stage that this process was started as, such as "train_rm"; empty if it was started as something else."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removeprefix(f"{PACKAGE}.") if spec and _is_ours(spec.name) else ""


def script_name(cmd: str) -> str:
    """The script that a stage of dvc.yaml runs, such as "train_rm": several groups of stages may run one."""
    found = re.search(rf"(?:-m {PACKAGE}\.|{PACKAGE}/launch\.sh )(\w+)", cmd)
    if found is None:
        raise StageError(f"dvc.yaml: no script of {PACKAGE} is run by the command {cmd!r}")
    return found[1]


def require_recorded_code() -> None:
    """Raise StageError if DVC runs this stage and will record other code for it than what runs.

    DVC reads the manifests as it starts: code that was edited while an earlier stage ran would go under the old record.
    """
    stage, own = os.environ.get("DVC_STAGE"), running_manifest()
    manifest = MANIFESTS / f"{_own_name()}.txt"
    if not stage or own is None or not manifest.is_file():
        return
    differing = differing_files(manifest.read_text(encoding="utf-8"), own)
    # Templates that settings choose are data.
    differing = [file for file in differing if file.endswith(".py") or file.startswith(f"{REWARDS}/")]
    if differing:
        raise StageError(
            f"{differing[0]} is not what {manifest} says, which DVC records for {stage}: it was edited after this run "
            "of DVC began; start it again"
        )


def differing_files(one: str, other: str) -> list[str]:
    """The files that two manifests do not have alike, in the order of their names."""
    return sorted({line.partition(" ")[2] for line in {*one.splitlines()} ^ {*other.splitlines()}})


def closure(roots: Iterable[str], root: Path = Path()) -> list[str]:
    """The files that modules run or fill, sorted paths below `root`: modules (also those left out) and templates."""
    found: set[str] = set()
    pending = list(roots)
    while pending:
        file = pending.pop()
        if file in found:
            continue
        found.add(file)
        if file.endswith(".py"):
            source = read_source(root / file)
            pending += [path for name in source.imports if (path := _path_of(name, root))]
            pending += [path for path, name in _templates(root) if name in source.texts]
    return sorted(found)


def code_hash(file: Path) -> str:
    """16 hexadecimal digits of SHA-256: of a module's code, or of the bytes of any other file."""
    if file.suffix == ".py":
        return read_source(file).hash
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def read_source(file: Path) -> Source:
    return _source_of(file.read_text(encoding="utf-8"))


@cache
def _source_of(text: str) -> Source:
    statements = list(_statements(ast.parse(text)))
    code, texts = _without_remarks(text, _docstring_places(text, statements))
    return Source(hashlib.sha256(code.encode()).hexdigest()[:16], tuple(_imports(statements)), texts)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements of a module, wherever they stand, and the module itself."""
    yield node
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, field, None) or ():
            yield from _statements(child)


def _imports(statements: list[ast.AST]) -> Iterator[str]:
    """Dotted names that may be modules: of `from a import b` both `a` and `a.b`."""
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield statement.module
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)


def _docstring_places(text: str, statements: list[ast.AST]) -> set[int]:
    """Where in `text` a docstring begins."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    places = set()
    for statement in statements:
        if isinstance(statement, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = statement.body[0] if statement.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                places.add(starts[first.lineno - 1] + first.col_offset)  # nothing but white space is before it
    return places


def _without_remarks(text: str, docstrings: set[int]) -> tuple[str, frozenset[str]]:
    """(The code without comments, docstrings and blank lines; those of its strings that could name a file)."""
    strings: list[str] = []

    def placeholder(match: re.Match[str]) -> str:
        if match[0].startswith("#") or match.start() in docstrings:
            return ""
        strings.append(match[0])
        return "\0"  # what stands within a string, blank lines among it, is code

    code = _COMMENT_OR_STRING.sub(placeholder, text)
    lines = [line.rstrip() for line in code.split("\n")]
    contents = (string.strip("\"'") for string in strings)
    names = frozenset(content.rpartition("/")[2] for content in contents if not re.search(r"\s", content))
    return "\n".join([*filter(None, lines), *strings]), names


@cache
def _templates(root: Path) -> list[tuple[str, str]]:
    """(path below `root`, name) of each template that code fills. Chat templates are chosen by settings."""
    files = [file for file in sorted((root / PACKAGE / "templates").rglob("*")) if file.suffix == ".jinja"]
    return [(file.relative_to(root).as_posix(), file.name) for file in files]


def _path_of(module: str, root: Path) -> str | None:
    path = f"{module.replace('.', '/')}.py"
    is_known = _is_ours(module) or module.startswith(f"{REWARDS}.")
    return path if is_known and (root / path).is_file() else None


def _is_ours(module: str) -> bool:
    return module.startswith(f"{PACKAGE}.")
