"""Say of a section, a block or a key of params.yaml or runtime.yaml what it may hold.

    python -m stages.tools.explain train_dpo.loss          a block of params.yaml
    python -m stages.tools.explain train_sft.epochs        a key
    python -m stages.tools.explain runtime.default.threads a key of runtime.yaml
    python -m stages.tools.explain                         the sections of both files

Of each key: what it may be, bounds, default, [unit], meaning and (source). A number without an upper bound is at most
2147483647 if it is whole, else at most 1e9.
"""

import json
import textwrap
from collections.abc import Iterator
from typing import Annotated

import typer

from stages.lib.command.errors import StageError
from stages.lib.command.json_schema import KIND, NOTHING, Declared
from stages.lib.command.quoted import nearest
from stages.lib.command.run import run
from stages.lib.settings.schemas import params_schema, runtime_schema

RUNTIME = "runtime"
NAME = "<name>"  # stands for any name of a mapping
WIDTH = 100
INDENT = "  "
WORDS = {
    "boolean": "true | false",
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "object": "mapping",
}


def files() -> Declared:
    """Both files as one block: the sections of params.yaml, and `runtime` with those of runtime.yaml."""
    params, runtime = params_schema(), runtime_schema()
    runtime_block = {name: value for name, value in runtime.items() if name != "$defs"}
    schema = params | {
        "properties": params["properties"] | {RUNTIME: runtime_block},
        "$defs": params["$defs"] | runtime["$defs"],
    }
    return Declared.top(schema)


def found_at(key: str, top: Declared) -> list[Declared]:
    """What is declared at a dotted key, by every type of block that has it. Raises StageError if nothing is."""
    places = [top]
    parts = key.split(".")
    for number, part in enumerate(parts):
        if all(place.entry for place in places):
            places = [place.entry for place in places if place.entry]
            continue
        blocks = [block for place in places for block in place.types.values() or [place]]
        known = list(dict.fromkeys(name for block in blocks for name in block.keys))
        if part not in known:
            above = "".join(f"{name}." for name in parts[:number])
            names = [f"{above}{name}" for name in known]
            raise StageError(
                f"{key} is no section, block or key{nearest(f'{above}{part}', names)}; KEY= lists the sections"
            )
        places = [block.below(part) for block in blocks if part in block.keys]
    return places


def explained(name: str, declared: Declared, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """The lines on a key, and on every key below it.

    Args:
        above: the types of a block around it. One that may hold blocks of its own types, as a mixture of losses holds
            losses, says so without listing them again.
    """
    yield from wrapped_lines(f"{name}: {in_words(declared)}{default_of(declared)}", 0)
    yield from wrapped_lines(declared.node.get("description", ""), 2)
    if declared.entry:
        yield from (INDENT + line for line in explained(NAME, declared.entry, above))
    types = frozenset(declared.types)
    if types and types <= above:
        return
    for kind, block in (declared.types or {"": declared}).items():
        if kind:
            yield from wrapped_lines(f"{KIND}: {kind}", 1)
            yield from wrapped_lines(block.below(KIND).node["description"], 3)
        for key in block.keys:
            if key != KIND:
                yield from (
                    INDENT * (2 if kind else 1) + line for line in explained(key, block.below(key), types or above)
                )


def wrapped_lines(text: str, level: int) -> list[str]:
    """Lines of a text at a level, with room for six levels more on the left."""
    margin = INDENT * level
    return textwrap.wrap(text, WIDTH - 6 * len(INDENT), initial_indent=margin, subsequent_indent=margin)


def in_words(declared: Declared) -> str:
    """What a value may be, and its bounds."""
    node = declared.node
    if declared.types:
        words = f"a block of a type, {' | '.join(declared.types)}"
    elif declared.choices:
        words = " | ".join(map(str, declared.choices))
    elif "oneOf" in node:
        words = " | ".join(in_words(declared._replace(node=option)) for option in node["oneOf"])
    elif node.get("type") == "array":
        words = f"a list of {in_words(declared.below(0))}"
    else:
        words = (
            "keys"
            if declared.keys
            else "names, each with"
            if declared.entry
            else f"{WORDS[node['type']]} {declared.bounds()}".rstrip()
        )
    return f"null | {words}" if node.get("nullable") else words


def default_of(declared: Declared) -> str:
    """Of a block that is always there each key says its own."""
    default = declared.default
    if isinstance(default, dict) and declared.types:
        default = default[KIND]
    if default is NOTHING or (isinstance(default, dict) and declared.keys):
        return ""
    if declared.entry:
        return f"; default {', '.join(default) or 'none'}"
    return f"; default {default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)}"


def sections(declared: Declared, above: str = "") -> Iterator[str]:
    """A line for each key of a block."""
    width = max(map(len, declared.keys)) + len(above) + 2
    for key in declared.keys:
        line = f"{above + key:{width}}{declared.below(key).node['description']}"
        yield from textwrap.wrap(line, WIDTH, subsequent_indent=" " * width)


def main(
    key: Annotated[str, typer.Argument(help="Dotted, such as train_dpo.loss or runtime.default.threads.")] = "",
) -> None:
    """Say what a section, block or key of params.yaml or runtime.yaml may hold; without KEY list the sections."""
    top = files()
    if not key:
        lines = [*sections(top), *sections(top.below(RUNTIME), f"{RUNTIME}.")]
    elif key == RUNTIME:
        lines = [*sections(top.below(RUNTIME), f"{RUNTIME}.")]
    else:
        texts = ("\n".join(explained(key, declared)) for declared in found_at(key, top))
        lines = [*dict.fromkeys(texts)]  # of blocks of several types that have the same key, once
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
