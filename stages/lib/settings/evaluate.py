"""Section `evaluate` of params.yaml: what is measured on test rows to see how good a policy is."""

from typing import Annotated

from annotated_types import Ge, Le
from pydantic import model_validator

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Count, Name, NewTokens, NotNegative, Precision, Text
from stages.lib.settings.declaration import Settings, key
from stages.lib.settings.rewards import AnyReward, refuse_unjudged

Resamples = Annotated[int, Ge(100), Le(1_000_000)]


class Evaluate(Settings):
    """Policies on the test rows, each beside a reference: perplexity, replies to prompts, implicit rewards of pairs."""

    policies: dict[Name, Text] = key(
        {name: f"models/{name}" for name in ("sft", "dpo", "ppo", "grpo")},
        "name of each policy to evaluate: its model's folder",
    )
    reference: Text = key("models/sft", "folder of the language model that policies are compared with")
    seed: Seed | None = key(None, "of sampling and of the intervals; null: the common seed")
    max_prompts: Count | None = key(200, "of the test prompts; null: all of them", unit="prompts")
    max_new_tokens: NewTokens = key(64, "of a reply", unit="tokens")
    temperature: NotNegative = key(1.0, "of sampling; 0: greedy, else at least 0.001")
    rewards: dict[Name, AnyReward] = key(
        {}, "what also judges the replies, by name: functions, verifiers, rules, as train_ppo and train_grpo have them"
    )
    precision: Precision = key("fp32", "of weights and activations")
    bootstrap_resamples: Resamples = key(2000, "of the confidence intervals")

    @model_validator(mode="after")
    def _check(self) -> "Evaluate":
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature must be 0 (greedy) or at least 0.001, found {self.temperature}")
        refuse_unjudged(self.rewards)
        return self
