"""A row as a reader sees it: its keys and messages by line, with long texts cut short and odd characters escaped."""

import json
from typing import Any

LONGEST_TEXT = 2000  # characters shown of one text


def shown_row(row: dict[str, Any]) -> str:
    return json.dumps(shortened(row), indent=2, ensure_ascii=False).translate(ESCAPED)


def shortened(value: Any) -> Any:
    """The value, with the middle of its long texts left out."""
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shortened(item) for item in value]
    if not isinstance(value, str) or len(value) <= LONGEST_TEXT:
        return value
    half = LONGEST_TEXT // 2
    return f"{value[:half]} … {len(value) - 2 * half:,} characters … {value[-half:]}"


# What JSON leaves as it is and a terminal would obey, or an editor hide: C1 controls, marks of direction, separators.
ESCAPED = {
    code: f"\\u{code:04x}"
    for code in (
        *range(0x7F, 0xA0),
        0x061C,
        0x200E,
        0x200F,
        0x2028,
        0x2029,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    )
}
