"""Section `pass_rates` of params.yaml: prompts that a policy finds neither too easy nor too hard."""

from typing import Annotated, Self

from annotated_types import Ge, Le
from pydantic import model_validator

from stages.lib.command.json_schema import LARGEST_NUMBER
from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Count, Precision, Share, Text
from stages.lib.settings.declaration import key
from stages.lib.settings.rewards import MixedRewards
from stages.lib.settings.sampling import DrawingSettings


class PassRates(DrawingSettings, MixedRewards):
    """How often a policy's responses to each train prompt pass, and which prompts are kept for it."""

    model: Text = key("models/sft", "folder of the language model that is sampled from")
    prompts: Count | None = key(None, "drawn from the train prompts, as many; null: all of them", unit="prompts")
    samples_per_prompt: Annotated[int, Ge(1), Le(2**16)] = key(8, "to each prompt", unit="responses")
    passes_above: Annotated[float, Ge(-LARGEST_NUMBER), Le(LARGEST_NUMBER)] = key(
        0.5, "a response passes if its reward is above this", unit="of the reward"
    )
    keep_from: Share = key(
        0.1, "keep prompts of whose responses at least this share passes: below it they are too hard"
    )
    keep_to: Share = key(0.9, "and at most this share: above it they are too easy")
    seed: Seed | None = key(None, "of sampling, and of the draws of prompts; null: the common seed")
    precision: Precision = key("fp32", "of weights and activations, of the policy and of the reward model")

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.keep_from > self.keep_to:
            raise ValueError(f"keep_from ({self.keep_from}) must not be above keep_to ({self.keep_to})")
        return self
