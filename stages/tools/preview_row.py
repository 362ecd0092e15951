"""Show a row of a token table as its tokens, marked by what training makes of them.

    python -m stages.tools.preview_row --kind sft --row 3 --split train

`row` counts the lines of the prepared file from 0, as the table's column of that name does. On a terminal tokens are
coloured, elsewhere in brackets: [prompt] {trained} (masked); "chosen", "rejected" and "completion" are what a pair or a
rating compares, "mismatched" a reply to another prompt beside that of a rating.
"""

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from stages.lib.command.errors import StageError, one_line
from stages.lib.command.run import run
from stages.lib.data.encoding import special_tokens
from stages.lib.data.prepared_rows import KINDS, SPLITS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Style(NamedTuple):
    """How tokens of one sort are shown."""

    brackets: str
    colours: tuple[int, int]  # of 256, for tokens in turn


STYLES = {
    "prompt": Style("[]", (24, 31)),
    "trained": Style("{}", (22, 28)),
    "masked": Style("()", (238, 242)),
    "chosen": Style("{}", (22, 28)),
    "rejected": Style("<>", (88, 124)),
    "completion": Style("{}", (22, 28)),
    "mismatched": Style("()", (238, 242)),
}
WHITE_ON = "\x1b[38;5;255;48;5;{}m{}\x1b[0m"


def token_runs(row: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """The ids of a table's row in runs of one sort."""
    if "input_ids" in row:
        pairs = list(zip(row["loss_mask"], row["input_ids"], strict=True))
        for number, (learnt, run_) in enumerate(groupby(pairs, key=lambda pair: pair[0])):
            yield "trained" if learnt else "masked" if number else "prompt", [token for _, token in run_]
    for name, ids in row.items():
        if name.endswith("_ids") and name != "input_ids" and ids is not None:
            yield name.removesuffix("_ids"), ids


def shown_tokens(tokenizer: "PreTrainedTokenizerBase", ids: list[int], before: int | None) -> Iterator[str]:
    """Tokens as text in one line; one that is part of a character only, as the tokenizer writes it.

    Args:
        before: the token that they follow. A space that SentencePiece puts before a word is none at a beginning.
    """
    specials = special_tokens(tokenizer).text_of
    for token_id, previous in zip(ids, [before, *ids[:-1]], strict=True):
        yield shown_token(tokenizer, token_id, [] if previous is None or previous in specials else [previous])


def shown_token(tokenizer: "PreTrainedTokenizerBase", token_id: int, before: list[int]) -> str:
    special = special_tokens(tokenizer).text_of.get(token_id)
    start, whole = (
        tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) for ids in (before, [*before, token_id])
    )
    text = special or (whole[len(start) :] if whole.startswith(start) else "")
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        text = str(tokenizer.convert_ids_to_tokens(token_id))
    # A file's text must not reach the terminal as a command to it.
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def preview_lines(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any], *, coloured: bool) -> Iterator[str]:
    """A legend, and a line for each run of tokens of one sort."""
    runs = list(token_runs(row))
    sorts = list(dict.fromkeys(sort for sort, _ in runs))
    yield "  ".join(token_text(sort, sort, 0, coloured=coloured) for sort in sorts)
    width = max(map(len, sorts))
    before: int | None = None
    for sort, ids in runs:
        shown = enumerate(shown_tokens(tokenizer, ids, before))
        texts = [token_text(text, sort, place, coloured=coloured) for place, text in shown]
        yield f"{sort:<{width}} {len(ids):>5}  {''.join(texts)}"
        if sort not in ("chosen", "rejected", "completion"):  # these and what comes after them follow the prompt
            before = ids[-1]


def token_text(text: str, sort: str, place: int, *, coloured: bool) -> str:
    style = STYLES[sort]
    if coloured:
        return WHITE_ON.format(style.colours[place % 2], text)
    return f"{style.brackets[0]}{text}{style.brackets[1]}"


def found(path: Path, schema: Any, number: int) -> dict[str, Any]:
    """The row of a table that a line of the prepared file became. Raises StageError if there is none."""
    from stages.lib.data.token_tables import read_table

    table = read_table(path, schema)
    rows = table["row"][:]
    if number not in rows:
        near = "it was dropped, or is beyond the last" if number > rows[0] else f"the first is {rows[0]}"
        raise StageError(f"{path} has no row {number}: {near} (it has {len(rows):,}, up to {rows[-1]})")
    return table[rows.index(number)]


def main(
    kind: Annotated[str, typer.Option(help=", ".join(KINDS))],
    row: Annotated[int, typer.Option(min=0, help="Line of the prepared file, counted from 0.")] = 0,
    split: Annotated[str, typer.Option(help=", ".join(SPLITS))] = "train",
    tokens: Annotated[Path, typer.Option(help="Folder of the token tables.")] = Path("data/tokens"),
    tokenizer: Annotated[Path, typer.Option(help="Folder of the model with the tokenizer.")] = Path("models/base"),
) -> None:
    """Show one row of a token table."""
    from stages.lib.data.chat import load_tokenizer
    from stages.lib.data.token_rows import ENCODINGS
    from stages.lib.models.tokenizer_files import require_tokens_of

    for value, known, name in ((kind, KINDS, "kind"), (split, SPLITS, "split")):
        if value not in known:
            raise StageError(f"--{name} {value}: expected one of {', '.join(known)}")
    path = tokens / split / f"{kind}.arrow"
    values = found(path, next(made.schema for name, made in ENCODINGS.items() if name == kind), row)
    require_tokens_of(path, tokenizer)
    loaded = load_tokenizer(tokenizer)
    count = sum(len(ids) for _, ids in token_runs(values))
    print(f"{path}, row {row} (source {values['source'] or 'without a name'}): {count:,} tokens")
    for name in ("label", "score", "margin", "messages", "facts", "context"):
        if values.get(name) is not None and values[name] not in ("{}", "[]"):
            print(one_line(f"{name}: {values[name]}"))
    for line in preview_lines(loaded, values, coloured=sys.stdout.isatty()):
        print(line)


if __name__ == "__main__":
    run(main)
