"""Section `score_samples` of params.yaml: what a reward model thinks of the replies that were sampled to evaluate."""

from pydantic import model_validator

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Name, Precision, Several, Text
from stages.lib.settings.declaration import key
from stages.lib.settings.evaluate import Resamples
from stages.lib.settings.reward_reading import RewardSettings


class ScoreSamples(RewardSettings):
    """Scores of the replies of policies, beside those of the reference to the same prompts."""

    policies: Several[Name] = key(["sft", "dpo", "ppo", "grpo"], "of evaluate.policies; none: [], nothing is scored")
    reward_model: Text | None = key("models/rm", "folder of the reward model; null with policies: []")
    seed: Seed | None = key(None, "of the intervals; null: the common seed")
    precision: Precision = key("fp32", "of weights and activations")
    bootstrap_resamples: Resamples = key(2000, "of the confidence intervals")

    @model_validator(mode="after")
    def _check(self) -> "ScoreSamples":
        if self.policies and self.reward_model is None:
            raise ValueError("reward_model must name a folder where policies are scored, found nothing")
        if len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies must name each policy once, found {', '.join(self.policies)}")
        return self
