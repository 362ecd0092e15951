"""Section `tokenize_data` of params.yaml: budgets of tokens, and what becomes of rows that do not fit."""

from pydantic import model_validator

from stages.lib.settings.bounds import Count, ErrorOrDrop
from stages.lib.settings.declaration import Settings, key


class Tokenize(Settings):
    """Rows of text become tables of tokens."""

    max_length: Count = key(160, "of prompt and reply; at most the base model's positions", unit="tokens")
    max_prompt_length: Count = key(96, "of the prompt; below max_length", unit="tokens")
    overlong: ErrorOrDrop = key("error", "error: stop at the first row over a budget | drop: leave it out, counted")
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
        return self
