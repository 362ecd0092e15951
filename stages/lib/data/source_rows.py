"""What an example of raw data becomes: a row for each kind that its source serves.

A row is a prepared row (`stages.lib.data.prepared_rows`) with its `kind`, and with `split` where the source decides it.
"""

from collections.abc import Iterator
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import Example, Message, assistant
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
    known = {
        name: value for name in ("facts", "tools", "template_arguments") if (value := getattr(example, name, None))
    }
    for kind in kinds:
        for values in rows_of_kind(example, kind, where):
            yield {"kind": kind, **place, **values, **known}


def rows_of_kind(example: Example, kind: Kind, where: str) -> Iterator[dict[str, Any]]:
    text, label = getattr(example, "text", None), getattr(example, "label", None)
    if text is not None:
        if kind not in ("sft", "prompts"):
            raise StageError(f"{where}: a text without roles serves sft and prompts, not {kind}; {LEAVE_OUT}")
        yield {"text": text}
    elif kind == "prompts":
        yield {"prompt": example.prompt}
    elif example.reply is None:
        raise StageError(f"{where}: the row has a prompt and no reply, and so cannot serve {kind}; {LEAVE_OUT}")
    elif kind == "sft":
        if label is not False:
            yield {"messages": [*example.prompt, as_message(example.reply)]}
    elif kind == "preference":
        if example.rejected is None:
            raise StageError(f"{where}: the row has no rejected reply, and so cannot serve preference; {LEAVE_OUT}")
        chosen, rejected = [as_message(example.reply)], [as_message(example.rejected)]
        margin = {} if example.margin is None else {"margin": example.margin}
        yield {"prompt": example.prompt, "chosen": chosen, "rejected": rejected, **margin}
    else:
        yield from unpaired_rows(example, label, where)


def unpaired_rows(example: Example, label: bool | None, where: str) -> Iterator[dict[str, Any]]:
    replies = [(example.reply, label)]
    if example.rejected is not None:
        replies = [(example.reply, True), (example.rejected, False)]
    elif label is None:
        raise StageError(
            f"{where}: nothing says whether the reply is a good one, so it cannot serve unpaired; {LEAVE_OUT}"
        )
    for reply, good in replies:
        yield {"prompt": example.prompt, "completion": [as_message(reply)], "label": good}


LEAVE_OUT = "leave that out of the source's kinds"


def as_message(reply: str | Message | None) -> Message:
    assert reply is not None, "whoever calls this has seen that there is one"
    return assistant(reply) if isinstance(reply, str) else reply
