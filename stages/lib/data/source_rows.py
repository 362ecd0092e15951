"""What an example of raw data becomes: a row for each kind that its source serves.

A row is a prepared row (`stages.lib.data.prepared_rows`) with its `kind`, and with `split` where the source decides it.
"""

from collections.abc import Iterator
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import Example
from stages.lib.data.prepared_rows import Kind, Split

SourceRow = dict[str, Any]


def source_rows(example: Example, kinds: tuple[Kind, ...], split: Split | None, where: str) -> Iterator[SourceRow]:
    """The rows of one example. What is known of it (facts, tools, …) stands in each.

    A pair serves sft by its chosen reply, and unpaired by both; an unpaired reply serves sft if it is a good one.

    Raises:
        StageError: the example cannot be of a kind: it has no reply, or no pair of them, or is a text (`where` is
            named).
    """
    place = {} if split is None else {"split": split}
    known = {"facts": example.facts, "tools": example.tools, "template_arguments": example.template_arguments}
    beside = {name: value for name, value in known.items() if value}
    for kind in kinds:
        for values in rows_of_kind(example, kind, where):
            yield {"kind": kind, **place, **values, **beside}


def rows_of_kind(example: Example, kind: Kind, where: str) -> Iterator[dict[str, Any]]:
    prompt, reply, rejected = example.prompt, example.reply, example.rejected
    if example.text is not None:
        if kind not in ("sft", "prompts"):
            raise StageError(f"{where}: a text without roles serves sft and prompts, not {kind}; {LEAVE_OUT}")
        yield {"text": example.text}
    elif kind == "prompts":
        yield {"prompt": prompt}
    elif reply is None:
        raise StageError(f"{where}: the row has a prompt and no reply, and so cannot serve {kind}; {LEAVE_OUT}")
    elif kind == "sft":
        if example.label is not False:
            yield {"messages": [*prompt, reply]}
    elif kind == "preference":
        if rejected is None:
            raise StageError(f"{where}: the row has no rejected reply, and so cannot serve preference; {LEAVE_OUT}")
        margin = {} if example.margin is None else {"margin": example.margin}
        yield {"prompt": prompt, "chosen": [reply], "rejected": [rejected], **margin}
    elif rejected is not None:
        yield {"prompt": prompt, "completion": [reply], "label": True}
        yield {"prompt": prompt, "completion": [rejected], "label": False}
    elif example.label is not None:
        score = {} if example.score is None else {"score": example.score}
        yield {"prompt": prompt, "completion": [reply], "label": example.label, **score}
    else:
        raise StageError(f"{where}: nothing says whether the reply is a good one, as unpaired needs it; {LEAVE_OUT}")


LEAVE_OUT = "leave that out of the source's kinds"
