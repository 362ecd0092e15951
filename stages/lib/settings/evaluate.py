"""Section `evaluate` of params.yaml: what is measured on test rows to see how good a policy is."""

from typing import Annotated

from annotated_types import Ge, Le
from pydantic import model_validator

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Count, Name, NotNegative, Precision, Several, Temperature, Text
from stages.lib.settings.declaration import Settings, key
from stages.lib.settings.reward_part import Weight
from stages.lib.settings.rewards import AnyReward, refuse_unjudged
from stages.lib.settings.sampling import DrawingSettings

Resamples = Annotated[int, Ge(100), Le(1_000_000)]


class PassAtK(Settings):
    """How often at least one of k responses to a prompt is right."""

    samples: Annotated[int, Ge(1), Le(2**16)] = key(16, "to each prompt, of which k are taken", unit="responses")
    k: Several[Count] = key([1, 8], "each at most samples", source="arXiv 2107.03374, Eq 1")
    temperature: Temperature = key(1.0, "of these samples")
    above: Weight = key(0.5, "a response is right whose reward, or grade by its task, is above this")

    @model_validator(mode="after")
    def _check(self) -> "PassAtK":
        if not self.k or max(self.k) > self.samples:
            raise ValueError(f"k must name numbers from 1 to samples ({self.samples}), found {[*self.k]}")
        return self


class Evaluate(DrawingSettings):
    """Policies on the test rows, each beside a reference: perplexity, replies to prompts, implicit rewards of pairs."""

    policies: dict[Name, Text] = key(
        {name: f"models/{name}" for name in ("sft", "dpo", "ppo", "grpo")},
        "name of each policy to evaluate: its model's folder",
    )
    reference: Text = key("models/sft", "folder of the language model that policies are compared with")
    seed: Seed | None = key(None, "of sampling and of the intervals; null: the common seed")
    max_prompts: Count | None = key(200, "of the test prompts; null: all of them", unit="prompts")
    temperature: NotNegative = key(1.0, "of sampling; 0: greedy, else at least 0.001")
    pass_at_k: PassAtK | None = key(
        None,
        "null: not measured; else a block: several responses to each prompt, judged by rewards and the prompts' tasks",
    )
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
