"""YAML 1.2 as DVC reads it, less what no settings file needs: tags, aliases, keys that are not text.

What is refused, and what cannot be read, is one message that names file and line.
"""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from stages.lib.command.errors import StageError

DEEPEST = 50  # levels of keys and lists
TEXT = "tag:yaml.org,2002:str"


class RefusedYAMLError(MarkedYAMLError):
    """YAML that is valid but not read here."""


class StrictComposer(Composer):
    """Refuses aliases, which can grow without bound or hold themselves, and tags, which ask for types of their own."""

    def compose_node(self, parent: Any, index: Any) -> Node:
        event = self.parser.peek_event()
        if isinstance(event, AliasEvent):
            refuse(f"the alias *{short(event.anchor)} is not read: write its value out", event)
        if getattr(event, "ctag", None) is not None:
            refuse(f"the tag {short(str(event.ctag))} is not read: leave it out, and put text in quotes", event)
        if self.depth >= DEEPEST:
            refuse(f"more than {DEEPEST} levels of keys and lists", event)
        return super().compose_node(parent, index)


class StrictConstructor(SafeConstructor):
    """Refuses keys that are not text or stand twice, and names the line of an impossible value."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[str, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or str(key.tag) != TEXT:
                refuse(f"a key must be text, found {short(text_of(key)) or 'nothing'}: put it in quotes", key)
            if key.value in seen:
                refuse(f"the key {short(key.value)} stands twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            refuse(f"{short(text_of(node))} cannot be read as a value ({short(str(error))})", node)


def refuse(problem: str, node: Any) -> None:
    raise RefusedYAMLError(problem=problem, problem_mark=node.start_mark)


def text_of(node: Node) -> str:
    if isinstance(node, ScalarNode):
        return node.value
    return "a mapping" if isinstance(node, MappingNode) else "a sequence"


def short(text: str) -> str:
    """`text` with its middle left out if it is long."""
    return text if len(text) <= 80 else f"{text[:40]}…{text[-40:]}"


def load_yaml(path: Path) -> dict[str, Any]:
    """Load a mapping. Raises StageError naming the file, and the line, if it cannot be read as one."""
    if not path.exists():
        raise StageError(f"{path} is missing; run from the project's top folder")
    if not path.is_file():
        raise StageError(f"{path} is not a file")
    try:
        document = deepcopy(document_of(path.read_text(encoding="utf-8")))
    except RefusedYAMLError as error:
        raise StageError(f"{path}{line_of(error)}: {error.problem}") from None
    except UnicodeDecodeError as error:
        raise StageError(f"{path}: not UTF-8 text ({error.reason})") from None
    except YAMLError as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise StageError(f"{path}{line_of(error)}: not valid YAML ({short(problem)})") from None
    if not isinstance(document, dict):
        found = "nothing" if document is None else type(document).__name__
        raise StageError(f"{path}: expected sections (key: value), found {found}")
    return document


@lru_cache(maxsize=8)
def document_of(text: str) -> Any:
    """What a text says; remembered, as a stage asks for params.yaml several times and each takes 30 ms."""
    return strict_reader().load(text)


def strict_reader() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = StrictComposer
    yaml.Constructor = StrictConstructor
    return yaml


def line_of(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}"
