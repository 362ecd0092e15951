"""The text of params.yaml, made of settings: their values, each with what its declaration says of it as a comment.

The form is the one in which DVC writes the file (`dvc exp run -S`), so that an experiment changes its own lines alone.
What several sections have alike, such as an optimizer, is explained in the first of them.
"""

import textwrap
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from stages.lib.command.json_schema import Declared
from stages.lib.command.params import PARAMS_FILE

HEADER = """\
# yaml-language-server: $schema=schemas/params.schema.json
# What is computed. Each section is read by the stage that it is named for, and by no other; DVC reruns a stage when its
# section changes, or a value above the sections. How it is computed (threads, memory, processes): runtime.yaml.
# A key without a value is null. `make explain KEY=train_dpo` says of each key what it may be, its default, unit and
# source; editors that know YAML schemas do so too. `make use PROFILE=default` writes this file as it first was.
"""
COMMENT_COLUMN = 32
LONGEST_LINE = 130
WIDTH_ABOVE = 110


def params_text(settings: dict[str, Any], declared: Declared) -> str:
    """The text of a params.yaml that holds `settings`, which are `declared` so."""
    text = HEADER + "\n".join(_Writer().lines(settings, declared, 0)) + "\n"
    return dumps_yaml(parse_yaml_for_update(text, str(PARAMS_FILE)))


class _Writer:
    """Writes mappings line by line, and knows what it has written."""

    def __init__(self) -> None:
        self.said: set[str] = set()
        self.after_list = False  # DVC drops a comment that stands alone behind a list's last item

    def lines(self, values: dict[str, Any], declared: Declared, indent: int) -> Iterator[str]:
        for name, value in values.items():
            below = (declared.entry or declared.below(name)).narrowed(value)
            if indent == 0 and isinstance(value, dict):
                yield ""
            comment = "" if declared.entry else self.once(declared.below(name).node.get("description", ""))
            if isinstance(value, dict) and value and not below.types and (below.keys or below.entry):
                yield from self.line(f"{name}:", comment, indent)
                yield from self.lines(value, below, indent + 2)
            elif isinstance(value, list | tuple) and value:
                yield from self.line(f"{name}:", comment, indent)
                yield from (f"{' ' * indent}- {_flow(item)}" for item in value)
                self.after_list = True
            else:
                text = "" if value is None else f" {_flow(value)}"
                yield from self.line(f"{name}:{text}", comment, indent)
                if value is None and comment and below.keys and not below.types:
                    defaults = {key: below.below(key).defaults for key in below.keys}
                    yield from (f"{' ' * (indent + 2)}#{line}" for line in self.lines(defaults, below, 1))

    def once(self, description: str) -> str:
        if description in self.said:
            return ""
        self.said.add(description)
        return description

    def line(self, text: str, comment: str, indent: int) -> Iterator[str]:
        """A key with its comment behind it or, where the line would be too long, above it."""
        text = " " * indent + text
        behind = f"{text:{COMMENT_COLUMN - 1}} # {comment}"
        if comment and len(behind) > LONGEST_LINE and not self.after_list:
            yield from _above(comment, indent)
            yield text
        else:
            yield behind if comment else text
        self.after_list = False


def _above(comment: str, indent: int) -> Iterator[str]:
    margin = " " * indent
    for line in textwrap.wrap(comment, WIDTH_ABOVE - indent, break_on_hyphens=False):
        yield f"{margin}# {line}"


def _flow(value: Any) -> str:
    """A value on one line, as DVC writes it."""
    text = dumps_yaml({"x": _as_dvc_writes(value)})
    return " ".join(text.removeprefix("x:").split()) or "null"


def _as_dvc_writes(value: Any) -> Any:
    """Mappings and lists in brackets, a small number as 1.0e-5."""
    if isinstance(value, dict):
        block = CommentedMap({name: _as_dvc_writes(item) for name, item in value.items()})
        block.fa.set_flow_style()
        return block
    if isinstance(value, list | tuple):
        several = CommentedSeq(map(_as_dvc_writes, value))
        several.fa.set_flow_style()
        return several
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        digits, _, exponent = f"{Decimal(repr(value)):e}".partition("e")
        return YAML().load(f"{digits if '.' in digits else f'{digits}.0'}e{exponent}")
    return value
