"""dvc.yaml, and what the source of its stages says of them."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.lib.operations.code_closure import MANIFESTS, closure, script_name
from stages.lib.settings.sections import default_params

ROOT = Path(__file__).resolve().parents[2]
FIRST = "code_manifest"  # the stage that checks the settings and writes the manifests
LAUNCHER = "stages/launch.sh"
CHAT_TEMPLATE = "stages/chat_templates/chat.jinja"  # brought by a setting of prepare_base, not by code
READS_FOR_OTHERS = "stages/lib/command/entries.py"  # the section that `read_entry` is given


def load_graph(root: Path = ROOT) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text(encoding="utf-8"))


def paths(entries: list[Any] | None) -> list[str]:
    """The paths of a list of deps, outs, metrics or plots; an entry with options is a mapping with one key."""
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries or []]


def outs_of(stage: dict[str, Any]) -> list[str]:
    return paths([*(stage.get("outs") or []), *(stage.get("metrics") or []), *(stage.get("plots") or [])])


def instances(
    name: str, stage: dict[str, Any], params: dict[str, Any] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A stage as it stands or, of one with a matrix over one key or with foreach, a copy for each value, put in."""
    params = params or default_params()
    if "foreach" in stage:
        entries = in_params(stage["foreach"], params)
        for key, value in entries.items() if isinstance(entries, dict) else zip(entries, entries, strict=True):
            filled = put_in(put_in(stage["do"], "${key}", key), "${item}", str(value))
            for part, below in parts_of(value):
                filled = put_in(filled, f"${{item{part}}}", str(below))
            yield f"{name}@{key}", filled
    elif "matrix" in stage:
        ((key, values),) = stage["matrix"].items()
        for value in in_params(values, params) if isinstance(values, str) else values:
            yield f"{name}@{value}", put_in(stage, f"${{item.{key}}}", value)
    else:
        yield name, stage


def parts_of(entry: Any) -> Iterator[tuple[str, Any]]:
    """What an entry of params.yaml holds, by its path: (".critic", {…}), (".critic.path", "models/rm")."""
    for key, value in entry.items() if isinstance(entry, dict) else ():
        yield f".{key}", value
        yield from ((f".{key}{path}", below) for path, below in parts_of(value))


def in_params(template: str, params: dict[str, Any]) -> Any:
    """What `${section.key}` stands for."""
    value: Any = params
    for part in template.strip("${}").split("."):
        value = value[part]
    return value


def body_of(stage: dict[str, Any]) -> dict[str, Any]:
    """What a group of stages is made from, or a stage itself."""
    return stage.get("do", stage)


def put_in(node: Any, placeholder: str, value: str) -> Any:
    if isinstance(node, dict):
        return {put_in(key, placeholder, value): put_in(item, placeholder, value) for key, item in node.items()}
    if isinstance(node, list):
        return [put_in(item, placeholder, value) for item in node]
    return node.replace(placeholder, value) if isinstance(node, str) else node


def all_instances(graph: dict[str, Any], params: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Every stage by its name, with the default settings or others."""
    return dict(instance for name, stage in graph["stages"].items() for instance in instances(name, stage, params))


def is_code(dep: str) -> bool:
    return is_at_or_below(dep, str(MANIFESTS))


def is_at_or_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def stage_names() -> tuple[str, ...]:
    """All stages, each instance of one with a matrix, in the order in which they can run."""
    return tuple(all_instances(load_graph()))


def training_stages() -> tuple[str, ...]:
    """The stages that train a model, as the default run has them."""
    return tuple(name for name in all_instances(load_graph()) if name.startswith("train_"))


def computing_stages() -> tuple[str, ...]:
    """The stages that $LAUNCH starts, on several processes if so asked, but for evaluations."""
    stages = all_instances(load_graph())
    evaluations = ("evaluate", "evaluate_rm", "score_samples")
    return tuple(
        name for name, stage in stages.items() if LAUNCHER in stage["cmd"] and name.partition("@")[0] not in evaluations
    )


def trained_policies() -> tuple[str, ...]:
    """The policies that are evaluated beside the supervised model."""
    return tuple(policy for policy in default_params()["evaluate"]["policies"] if policy != "sft")


def script_of(stage: str) -> str:
    """The script of a stage, or of an instance of a group: several groups may run one."""
    name = stage.partition("@")[0]
    group = load_graph()["stages"].get(name)
    return f"stages/{script_name(body_of(group)['cmd']) if group else name}.py"


def manifest_path(stage: str) -> str:
    return f"{MANIFESTS}/{Path(script_of(stage)).stem}.txt"


def code_of(stage: str, root: Path = ROOT) -> list[str]:
    """Every file that a stage runs or fills, also those that manifests leave out."""
    return closure([script_of(stage)], root)


def declared_code(stage: str, root: Path = ROOT) -> list[str]:
    """Every file of `stages/` that a stage runs, fills or, by the default settings, reads."""
    return code_of(stage, root) + ([CHAT_TEMPLATE] if script_of(stage) == "stages/prepare_base.py" else [])


def params_read(files: list[str], root: Path = ROOT) -> set[str]:
    """Top-level keys of params.yaml that code reads, by its calls of `read_params` and their like."""
    keys = set()
    for file in files:
        if not file.endswith(".py") or file == READS_FOR_OTHERS:
            continue
        for node in ast.walk(parsed(root / file)):
            if isinstance(node, ast.Call) and called_name(node) == "read_seed":
                keys.add("seed")
            elif isinstance(node, ast.Call) and called_name(node) in ("read_params", "read_value", "read_entry"):
                if not (node.args and is_text(node.args[0])):
                    raise ValueError(f"{file}:{node.lineno}: the key must be written out, or no test can see it")
                keys.add(node.args[0].value)
    return keys


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what a module imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def called_name(call: ast.Call) -> str:
    return getattr(call.func, "id", None) or getattr(call.func, "attr", "")


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
