"""Show what a policy wrote while it was trained, sorted and filtered by any column of its rollouts.

    python -m stages.tools.show_samples --of grpo --sort -score --where "ended = false" --where "kl > 2" --count 3

Columns are those of data/rollouts/<name>/rollouts.parquet: iteration, row, sample, source, facts, prompt, prompt_ids,
response, response_ids, length, ended, score, rewards/<name>, advantage, kl. A condition is a column, one of = != < <= >
>= and a value, or `~` and a text that is in the column's.
"""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.command.run import run

if TYPE_CHECKING:
    import pyarrow as pa

CONDITION = re.compile(r"\s*([^=!<>~\s]+)\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
TRUTH = {"true": True, "false": False}
TEXTS = ("prompt", "response")


def chosen(table: "pa.Table", conditions: Sequence[str], sort: Sequence[str]) -> "pa.Table":
    """The rows that meet all conditions, sorted by columns, the first one first; a minus before it: largest first.

    Rows without a value in a column meet no condition on it, and come last.

    Raises:
        StageError: a column that there is not, or a condition that cannot be read.
    """
    keep = [True] * len(table)
    for condition in conditions:
        name, holds = read_condition(condition, table)
        values = table[name].to_pylist()
        keep = [before and value is not None and holds(value) for before, value in zip(keep, values, strict=True)]
    rows = [row for row, kept in enumerate(keep) if kept]
    for key in reversed(sort):
        values = dict(enumerate(table[known(key.removeprefix("-"), table)].to_pylist()))
        there = [row for row in rows if values[row] is not None]
        missing = [row for row in rows if values[row] is None]
        rows = sorted(there, key=values.__getitem__, reverse=key.startswith("-")) + missing
    return table.take(rows) if rows else table.slice(0, 0)  # of an empty list no type is known


def known(name: str, table: "pa.Table") -> str:
    if name not in table.column_names:
        raise StageError(
            f"there is no column {name!r}{nearest(name, table.column_names)}; there are {', '.join(table.column_names)}"
        )
    return name


def read_condition(condition: str, table: "pa.Table") -> tuple[str, Callable[[Any], bool]]:
    """Its column, and what a value there must meet."""
    import pyarrow as pa

    parts = CONDITION.fullmatch(condition)
    if parts is None:
        raise StageError(f"--where {condition!r}: expected a column, one of = != < <= > >= ~ and a value")
    name, sign, text = parts.groups()
    kind = table.schema.field(known(name, table)).type
    if sign == "~":
        return name, lambda value: text in str(value)
    compare = COMPARED[sign]
    if pa.types.is_string(kind):
        return name, lambda value: compare(value, text)
    if pa.types.is_list(kind):
        raise StageError(f"--where {condition!r}: {name} holds lists, which only ~ can search")
    try:
        wanted = TRUTH[text] if pa.types.is_boolean(kind) else float(text)
    except (KeyError, ValueError):
        expected = "true or false" if pa.types.is_boolean(kind) else "a number"
        raise StageError(f"--where {condition!r}: {name} is {expected}, not {text!r}") from None
    return name, lambda value: compare(value, wanted)


def sample_lines(row: dict[str, Any]) -> Iterator[str]:
    """A response with what is known of it, free of what a terminal would take for a command."""
    yield "  ".join(
        f"{name} {printed_value(value)}"
        for name, value in row.items()
        if name not in TEXTS and not isinstance(value, list) and value not in (None, "", "{}")
    )
    for name in TEXTS:
        yield f"  {name:<8} {row[name]!r}"


def printed_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, int | float) else str(value) if value.isprintable() else repr(value)


def main(
    of: Annotated[str, typer.Option(help="name of the policy")],
    sort: Annotated[
        list[str] | None, typer.Option(help="a column, with a minus: largest first; may be repeated")
    ] = None,
    where: Annotated[list[str] | None, typer.Option(help="a condition, such as 'kl > 2'; may be repeated")] = None,
    count: Annotated[int, typer.Option(help="how many are shown", min=1)] = 10,
    held_out: Annotated[bool, typer.Option(help="answers to validation prompts")] = False,
    rollouts: Annotated[Path, typer.Option(help="folder of all policies' rollouts")] = Path("data/rollouts"),
) -> None:
    """Show responses of a policy in training."""
    import pyarrow.parquet as pq

    path = rollouts / of / ("held_out.parquet" if held_out else "rollouts.parquet")
    if not path.is_file():
        there = sorted(one.parent.name for one in rollouts.glob(f"*/{path.name}"))
        raise StageError(f"{path} does not exist; there are rollouts of: {', '.join(there) or 'no policy'}")
    table = pq.read_table(path)
    found = chosen(table, where or [], sort or [])
    print(f"{path}: {len(found):,} of {len(table):,} responses, {min(count, len(found)):,} shown")
    for row in found.slice(0, count).to_pylist():
        print()
        for line in sample_lines(row):
            print(line)


if __name__ == "__main__":
    run(main)
