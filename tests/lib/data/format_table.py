"""The page docs/formats.md, made of the examples of formats: python -m tests.lib.data.format_table --write."""

import json
import sys
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.data.formats import READERS
from stages.lib.data.prepared_rows import Kind
from stages.lib.settings.declaration import Settings, block
from stages.lib.settings.reading import Threshold
from tests.lib.data.format_examples import EXAMPLES, FormatExample
from tests.lib.data.reading import COMPARISONS
from tests.lib.data.trained_texts import trained_texts
from tests.real_files import PROJECT

BLOCKS = [*(("comparison", model) for model in COMPARISONS.values()), ("threshold", Threshold)]
LONGEST = 80  # characters of a text that is trained
PAGE = PROJECT / "docs" / "formats.md"
BEFORE = """# Formats of raw data

Made of the examples that the tests read (`tests/lib/data/format_examples.py`); written by
`python -m tests.lib.data.format_table --write`.

A row's format is named in `format`, or `auto`: then it must be certain by its columns, or the run ends with a line
that lists the candidates. `columns` gives columns of your own the names below (`question.text` is the key `text` of
the object in the column `question`), and `facts` lets columns ride on with prompts to rewards and evaluation. What the
raw rows become is shown for the kind that they are made for; a pair also gives an sft row with its chosen reply, and
each of them a prompt.

What is trained of these rows is what the loss, or the comparison of two replies, is over: their tokens as tokenize_data
makes them by `stages/chat_templates/chat.jinja` with the default `loss_on`, decoded. Several turns of a conversation
stand in their order. Of a whole text the first token is not trained, since none comes before it; here a token is a
byte. Of a prompt, of which nothing is trained, its end is shown as the policy is given it.

Files are `.jsonl`, `.json` (an array, or an object with the rows under the key that `rows_key` names), `.csv` (commas,
or semicolons or tabs where the header leaves no doubt; else `delimiter` names it), `.tsv` (all of them also `.gz`) and
`.parquet`. Text files, such as one file for each review, become one of them in a line of Python:

    python -c 'import json, pathlib, sys
    for file in sorted(pathlib.Path(sys.argv[1]).rglob("*.txt")):
        print(json.dumps({"text": file.read_text(encoding="utf-8"), "of": file.parent.name}))' reviews > reviews.jsonl

(`format: text`, and `of` in `ignore_columns` or, where a reward is to know it, in `facts`.)
"""
COMPARISONS = """
**Which response is better is never guessed.** An index may count from 0 or from 1, and a letter may stand for a column
or for a place on a screen: `first` and `second` say which values of `winner` mean which response. A row with a vote
that is in none of `first`, `second` and `tie` is an error, whatever `on_unusable_row` says. Keys of `comparison` that
an example does not show are as they are by default; in params.yaml all of them must stand (below). Two responses that
`columns` names chosen and rejected, beside a column, or a key of an object in one, that may say which of them won or
scored more, are refused until that column is described here or ignored by name. Scores of replies that the data itself
names chosen and rejected may stand beside them as long as they agree; they are not used.
"""
AFTER = """
## Columns of each format

| format | needs | reads where present |
|---|---|---|
"""
SETTINGS = """
## The blocks `comparison` and `threshold`

With the defaults of their keys, all of which must be there.
"""


def page() -> str:
    parts = [BEFORE]
    for title, examples in EXAMPLES.items():
        parts.append(f"\n## {title}\n")
        if title.startswith("Two responses"):
            parts.append(COMPARISONS)
        parts.append(
            "\n| what it is | format | a row | options | what it becomes | trained |\n|---|---|---|---|---|---|\n"
        )
        parts += [line(example) for example in examples]
    parts.append(AFTER)
    for name, reader in READERS.items():
        needs = ", ".join(reader.columns) or "what `comparison` names"
        parts.append(f"| {name} | {needs} | {', '.join(reader.optional) or '–'} |\n")
    parts.append(SETTINGS)
    for name, model in BLOCKS:
        parts.append(f"\n```yaml\n{name}:\n{keys_of(model)}```\n")
    return "".join(parts)


def keys_of(model: type[Settings]) -> str:
    """The keys of a block with their defaults, and what they say."""
    defaults, lines = block(model), []
    names = sorted(model.model_fields, key=lambda key: key != "type")  # the type first
    for name in names:
        lines.append(f"  # {model.model_fields[name].description}\n")
        lines.append(f"  {name}: {json.dumps(defaults[name], ensure_ascii=False)}\n")
    return "".join(lines)


def line(example: FormatExample) -> str:
    settings = {
        **({"columns": example.columns} if example.columns else {}),
        **({"facts": list(example.facts)} if example.facts else {}),
        **example.options,
    }
    made = [code(row) for row in example.becomes]
    counted = [f"{name}: {count}" for name, count in example.counts.items()]
    cells = [
        example.what,
        f"`{example.format}`",
        "<br>".join(code(row) for row in example.rows),
        "<br>".join(f"`{key}:` {code(value)}" for key, value in settings.items()),
        "<br>".join(made) + (f"<br>counted: {', '.join(counted)}" if counted else ""),
        "<br>".join(trained(example.kind, row) for row in example.becomes),
    ]
    return f"| {' | '.join(cells)} |\n"


def trained(kind: Kind, row: dict[str, Any]) -> str:
    """What is trained of a row, each text by itself, or why the template refuses it."""
    try:
        runs = trained_texts(kind, row)
    except StageError as error:
        return str(error).replace("|", "\\|")
    named = [(f"{sort}: " if kind == "preference" else "") + code(shortened(kind, text)) for sort, text in runs]
    return ", ".join(named)


def shortened(kind: Kind, text: str) -> str:
    """The beginning of a long text, or the end of a prompt."""
    if len(text) <= LONGEST:
        return text
    return f"…{text[-LONGEST:]}" if kind == "prompts" else f"{text[:LONGEST]}…"


def code(value: Any) -> str:
    """JSON between backticks, which a cell of a table can hold."""
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
