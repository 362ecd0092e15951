"""Section `tokenize_data` of params.yaml: budgets of tokens, what of a row is trained, and what becomes of the rest."""

from typing import Literal

from pydantic import model_validator

from stages.lib.settings.bounds import Count, ErrorOrDrop, Several
from stages.lib.settings.declaration import Settings, key

LossOn = Literal["all_replies", "last_reply"]
Truncation = Literal["error", "drop", "keep_end", "keep_start"]


class Tokenize(Settings):
    """Rows of text become tables of tokens."""

    loss_on: LossOn = key(
        "all_replies",
        "of a conversation in SFT: all_replies: every turn of the assistant | last_reply. Where a row's turns have a "
        "weight, those of weight 1; rows of whole text are trained whole",
    )
    max_length: Count = key(160, "of prompt and reply; at most the base model's positions", unit="tokens")
    max_prompt_length: Count = key(96, "of what stands before the first trained token; below max_length", unit="tokens")
    max_completion_length: Count | None = key(
        None, "of what stands from there on; null: what max_length leaves", unit="tokens"
    )
    truncation: Truncation = key(
        "error",
        "of a row over a budget: error: stop | drop: leave it out, counted | keep_end: cut the beginning off its "
        "prompt | keep_start: cut the end off its prompt. A reply that does not fit beside a cut prompt is left out, "
        "counted",
    )
    cut_replies: bool = key(
        False, "with keep_end or keep_start: cut the end off a reply that does not fit, which then has no EOS"
    )
    text_prompt_tokens: Several[Count] | None = key(
        None,
        "of a prompt of plain text take the first k tokens, k drawn for each row from [least, most], both included; "
        "null: all",
        unit="tokens",
    )
    on_unusable_row: ErrorOrDrop = key(
        "error", "error: stop at the first row that the chat template refuses or changes | drop: leave it out, counted"
    )

    @model_validator(mode="after")
    def _check(self) -> "Tokenize":
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length "
                f"({self.max_length}): a reply needs at least one token"
            )
        if self.max_completion_length is not None and self.max_completion_length > self.max_length:
            raise ValueError(
                f"max_completion_length ({self.max_completion_length}) must not be above max_length ({self.max_length})"
            )
        if self.cut_replies and self.truncation not in ("keep_end", "keep_start"):
            raise ValueError(f"cut_replies needs truncation: keep_end or keep_start, and it is {self.truncation}")
        bounds = self.text_prompt_tokens
        if bounds is not None and (len(bounds) != 2 or bounds[0] > bounds[1]):
            raise ValueError(f"text_prompt_tokens must be [least, most], found {list(bounds)}")
        return self
