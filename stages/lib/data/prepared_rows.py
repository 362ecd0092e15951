"""Prepared rows: what prepare_data writes and tokenize_data reads, as JSON lines in `<split>/<kind>.jsonl`.

sft         {"messages": [...]}                     a prompt and its reply; or {"text"}, trained as a whole
preference  {"prompt", "chosen", "rejected"}        one reply each, and "margin" where there is one
unpaired    {"prompt", "completion", "label"}       one reply, and whether it is a good one
prompts     {"prompt"}                              or {"text"}: a prompt that no chat template goes around

All have "source", the name of their source, and may have "facts", an object of what is known of them, and "tools" and
"template_arguments", which the chat template gets. `stages.lib.data.conversation_rows` reads them.
"""

from typing import Any, Literal, NamedTuple, get_args

from stages.lib.data.conversations import Message, assistant

Kind = Literal["sft", "preference", "unpaired", "prompts"]
Split = Literal["train", "validation", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)


class PreparedRow(NamedTuple):
    """A row to be written: what its line holds, and to which file it goes."""

    kind: Kind
    split: Split
    values: dict[str, Any]


def preference_pair(prompt: list[Message], chosen: str, rejected: str, margin: float | None = None) -> dict[str, Any]:
    """What a row of kind preference holds."""
    pair = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return pair if margin is None else pair | {"margin": margin}
