"""Ways of making a value, a JSON tree, a text or a file wrong, each with its description."""

import json
import math
import random
from typing import Any

Described = tuple[str, Any]


class Raw(str):
    """Text that stands in a JSON (or YAML) file as it is, without quotes."""

    __slots__ = ()


DIGITS = 5000  # more than Python reads as an integer
ODD_VALUES: tuple[Described, ...] = (
    *((repr(value), value) for value in (None, True, False, 0, -1, 1, 2**31, -(2**63), 2**64, 0.5, -0.5)),
    *((repr(value), value) for value in (1e308, 1e39, 5e-324, float("nan"), float("inf"), float("-inf"))),
    ("a 400-digit integer", 10**400),
    (f"a {DIGITS}-digit integer", Raw("9" * DIGITS)),
    *((repr(value), value) for value in ("", " ", "text", "5", "nan", "None", "true", "\0", "a\nerror: b", "a\u2028b")),
    *((repr(value), value) for value in ("\ud800", "e\u0301", "\u202ereversed", "\ufeffmarked", "<script>alert(1)")),
    *((repr(value), value) for value in ("{{ 1/0 }}", "$(touch pwned)", "`touch pwned`", "; touch pwned", "' \" \\")),
    *((repr(value), value) for value in ("../outside", "/etc/passwd", ".git", "<|endoftext|>", "<|user|>", "url(#x")),
    ("a text of 100,000 characters", "x" * 100_000),
    *((repr(value), value) for value in ([], {}, [None], [[]], [5], ["user"], {"a": 1}, {"": None}, ["a", "a"])),
    ("3,000 nested lists", Raw("[" * 3000 + "]" * 3000)),
    ("100,000 nested lists", Raw("[" * 100_000 + "]" * 100_000)),
    ("300 nested mappings", Raw('{"a":' * 300 + "1" + "}" * 300)),
    ("a mapping with a key twice", Raw('{"a": 1, "a": 2}')),
)


def json_text(value: Any, **options: Any) -> str:
    """JSON in which `Raw` stands as it is, and NaN and infinities as Python writes them."""
    raw: list[Raw] = []

    def without_raw(item: Any) -> Any:
        if isinstance(item, Raw):
            raw.append(item)
            return f"@raw {len(raw) - 1}@"
        if isinstance(item, dict):
            return {key: without_raw(below) for key, below in item.items()}
        return [without_raw(below) for below in item] if isinstance(item, list) else item

    text = json.dumps(without_raw(value), **options)
    for number, item in enumerate(raw):
        text = text.replace(f'"@raw {number}@"', item)
    return text


def yaml_text(value: Any) -> str:
    """The same in JSON's form of YAML, which writes numbers that are not finite in its own way."""
    if isinstance(value, float) and not math.isfinite(value):
        return Raw({"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}[str(value)])
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)}: {yaml_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_text, value))}]"
    return json_text(value)


def mutated_tree(tree: Any, draw: random.Random) -> Described:
    """Change one place of a tree of dicts and lists. Returns what was done and a new tree; the old one stays."""
    tree = json.loads(json.dumps(tree))
    holders = [tree] if isinstance(tree, dict | list) and tree else []
    for holder in holders:
        below = holder.values() if isinstance(holder, dict) else holder
        holders += [item for item in below if isinstance(item, dict | list) and item]
    if not holders:
        return draw.choice(ODD_VALUES)
    holder = draw.choice(holders)
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    name = f"{key!r}" if isinstance(holder, dict) else f"item {key}"
    done = draw.choice(CHANGES)(holder, key, draw)
    return f"{name} {done}", tree


def _odd(holder: Any, key: Any, draw: random.Random) -> str:
    name, holder[key] = draw.choice(ODD_VALUES)
    return f"is {name}"


def _missing(holder: Any, key: Any, _: random.Random) -> str:
    del holder[key]
    return "is missing"


def _renamed(holder: Any, key: Any, draw: random.Random) -> str:
    if isinstance(holder, list):
        return _twice(holder, key, draw)
    new = draw.choice((f"{key}s", str(key).upper(), "", f"{key} ", "tools", "label", "system", "images"))
    holder[new] = holder.pop(key)
    return f"is called {new!r}"


def _twice(holder: Any, key: Any, draw: random.Random) -> str:
    if isinstance(holder, list):
        holder.insert(draw.randrange(len(holder) + 1), holder[key])
        return "comes twice"
    holder["extra"] = holder[key]
    return "also stands under 'extra'"


def _wrapped(holder: Any, key: Any, draw: random.Random) -> str:
    value = holder[key]
    name, holder[key] = draw.choice(
        (("in a list", [value]), ("in a mapping", {"value": value}), ("as text", str(value)))
    )
    return f"stands {name}"


def _as_json_text(holder: Any, key: Any, _: random.Random) -> str:
    holder[key] = json.dumps(holder[key])
    return "stands as JSON in a text"


def _lengthened(holder: Any, key: Any, draw: random.Random) -> str:
    if isinstance(holder[key], str):
        extra = draw.choice((" ", "\n", "\0", "\u200b", "\r\n", "<|endoftext|>", "\n\nHuman: again", "é", "\U0001f600"))
        holder[key] += extra
        return f"ends with {extra!r}"
    return _odd(holder, key, draw)


CHANGES = (_odd, _odd, _odd, _missing, _renamed, _twice, _wrapped, _as_json_text, _lengthened)


def mutated_bytes(content: bytes, draw: random.Random) -> Described:
    """Damage a file. Returns what was done and the new content."""
    place = draw.randrange(len(content)) if content else 0
    end = min(len(content), place + draw.choice((1, 2, 8, 64, 500)))
    flipped = bytes([content[place] ^ 1 << draw.randrange(8)]) if content else b"?"
    ways: tuple[Described, ...] = (
        (f"is cut off at byte {place}", content[:place]),
        (f"has a bit flipped in byte {place}", content[:place] + flipped + content[place + 1 :]),
        (f"lacks bytes {place} to {end}", content[:place] + content[end:]),
        (f"has bytes {place} to {end} twice", content[:end] + content[place:]),
        (f"has zeros at bytes {place} to {end}", content[:place] + bytes(end - place) + content[end:]),
        (f"has 0xFF at byte {place}", content[:place] + b"\xff" + content[place:]),
        ("ends with something else", content + b'\n{"a": [\x80\n'),
        ("begins with a byte order mark", b"\xef\xbb\xbf" + content),
        ("is empty", b""),
        ("is UTF-16", content.decode("latin-1").encode("utf-16")),
        ("is a pickle", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."),
    )
    return draw.choice(ways)
