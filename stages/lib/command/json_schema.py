"""Finding one's way in the JSON schema that pydantic makes of settings: what is declared of each key."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Node = dict[str, Any]
KIND = "type"  # the key that tells the types of a block apart
NOTHING: Any = ...  # the default of a key that has none
# The largest numbers unless a key says otherwise: a bound that goes without saying.
LARGEST_WHOLE = 2**31 - 1
LARGEST_NUMBER = 1e9
# The bounds of JSON Schema in words.
LOWER = {"exclusiveMinimum": "above", "minimum": "at least"}
UPPER = {"exclusiveMaximum": "below", "maximum": "at most"}


class Declared(NamedTuple):
    """What is declared of one place in a settings file: a node of the schema, and the whole schema it refers to."""

    node: Node
    schema: Node

    @classmethod
    def top(cls, schema: Node) -> "Declared":
        return cls(schema, schema).resolved()

    def resolved(self) -> "Declared":
        """With what the node refers to; of a value that may be null, what else it may be, marked as `nullable`."""
        node = self.node
        while "$ref" in node or "anyOf" in node:
            own = {name: value for name, value in node.items() if name not in ("$ref", "anyOf")}
            if "$ref" in node:
                node = self.schema["$defs"][node["$ref"].rpartition("/")[2]] | own
            else:
                other = next(option for option in node["anyOf"] if option != {"type": "null"})
                node = other | own | {"nullable": True}
        return self._replace(node=node)

    @property
    def types(self) -> "dict[str, Declared]":
        """The types of a block by name; none if it has no key `type` to choose one by."""
        if "discriminator" not in self.node:
            return {}
        options = [self._replace(node=option).resolved() for option in self.node["oneOf"]]
        return {option.node["properties"][KIND]["const"]: option for option in options}

    @property
    def keys(self) -> list[str]:
        """The keys of a block, of whatever type."""
        blocks = [*self.types.values()] or [self]
        return list(dict.fromkeys(key for block in blocks for key in block.node.get("properties", ())))

    @property
    def entry(self) -> "Declared | None":
        """What every entry of a mapping from names to blocks holds; None if it is something else."""
        found = of_any_name(self.node)
        declared = self._replace(node=found).resolved() if found else None
        return declared if declared and (declared.keys or declared.types) else None

    @property
    def choices(self) -> list[Any]:
        """The values of which one is to be chosen; none if it is no such choice."""
        return self.node.get("enum") or ([self.node["const"]] if "const" in self.node else [])

    @property
    def default(self) -> Any:
        return self.node.get("default", NOTHING)

    @property
    def defaults(self) -> Any:
        """The value that a key has by default or, of a block, those of its keys."""
        if self.default is NOTHING and "properties" in self.node:
            return {name: self.below(name).defaults for name in self.keys if name != KIND}
        return self.default

    def narrowed(self, values: Any) -> "Declared":
        """Of a block of several types the one that `values` name; else the same."""
        kind = values.get(KIND) if isinstance(values, Mapping) else None
        chosen = self.types.get(kind) if isinstance(kind, str) else None
        if chosen is None:
            return self
        is_default = isinstance(self.default, Mapping) and self.default.get(KIND) == kind
        return chosen._replace(node=chosen.node | {"default": self.default}) if is_default else chosen

    def below(self, part: str | int) -> "Declared":
        """What is declared of a key of a block, or of an item of a list; empty if nothing is."""
        if isinstance(part, int):
            found = self.node.get("items", {})
        else:
            found = self.node.get("properties", {}).get(part) or of_any_name(self.node)
        if isinstance(self.default, Mapping) and part in self.default:  # what stands nearer the top counts
            found = found | {"default": self.default[part]}
        return self._replace(node=found).resolved()

    def at(self, place: Sequence[str | int], values: Any) -> "Declared":
        """What is declared at a place, where the file holds `values`."""
        declared = self.narrowed(values)
        for part in place:
            values = item(values, part)
            declared = declared.below(part).narrowed(values)
        return declared

    def bounds(self, value: float | None = None) -> str:
        """The bounds of a number in words; one that holds for any number only where `value` is beyond it."""
        shown = []
        for words, sign in ((LOWER, -1), (UPPER, 1)):
            for name in words.keys() & self.node.keys():
                limit = self.node[name]
                is_general = limit in (sign * LARGEST_WHOLE, sign * LARGEST_NUMBER)
                if not is_general or (value is not None and sign * value > sign * limit):
                    shown.append(f"{words[name]} {limit}")
        return " and ".join(shown)


def of_any_name(node: Node) -> Node:
    """What a mapping holds under names that are not declared, or only as a pattern; empty if it may hold none."""
    patterns = [*node.get("patternProperties", {}).values()]
    return patterns[0] if patterns else node.get("additionalProperties") or {}


def item(values: Any, part: str | int) -> Any:
    """What stands at a mapping's key or a list's index, or None."""
    if isinstance(values, Mapping):
        return values.get(part)
    return values[part] if isinstance(values, list) and isinstance(part, int) and part < len(values) else None
