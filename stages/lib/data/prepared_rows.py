"""Prepared rows: what prepare_data writes and tokenize_data reads, as JSON lines in `<split>/<kind>.jsonl`.

sft         {"messages": [...]}                     a prompt and its reply; or {"text"}, trained on as a whole
preference  {"prompt", "chosen", "rejected"}        one reply each, and "margin" where there is one
unpaired    {"prompt", "completion", "label"}       one reply, whether it is a good one, and "score" where there is one
prompts     {"prompt"}                              or {"text"}, which no template is laid around

Each has "source", the name of its source, and where there are any "facts", an object of what is known of the row;
"tools", which the chat template lists; and "template_arguments", which it is given. A source's own rows, which
read_source writes and prepare_data reads, have "kind" besides, and "split" where the source decides it.
`stages.lib.data.conversation_rows` reads prepared rows.
"""

from typing import Any, Literal, NamedTuple, get_args

from stages.lib.data.conversations import Message, assistant

Kind = Literal["sft", "preference", "unpaired", "prompts"]
Split = Literal["train", "validation", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)
MAY_BE_EMPTY: tuple[tuple[Kind, Split], ...] = (
    ("prompts", "validation"),
)  # which sample_pairs alone reads, if asked to


class PreparedRow(NamedTuple):
    """A row to be written: what its line holds, and to which file it goes."""

    kind: Kind
    split: Split
    values: dict[str, Any]


def preference_pair(prompt: list[Message], chosen: str, rejected: str, margin: float | None = None) -> dict[str, Any]:
    """What a row of kind preference holds."""
    pair = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return pair if margin is None else pair | {"margin": margin}
