"""Section `score_samples` of params.yaml: what a reward model thinks of the replies that were sampled to evaluate."""

import os

from pydantic import model_validator

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Count, Name, Precision, Several, Text, WholeNumber
from stages.lib.settings.declaration import key
from stages.lib.settings.evaluate import Resamples
from stages.lib.settings.reward_reading import RewardReading, RewardSettings


class ScoreSamples(RewardSettings):
    """Scores of the replies of policies, beside those of the reference to the same prompts."""

    policies: Several[Name] = key(["sft", "dpo", "ppo", "grpo"], "of evaluate.policies; none: [], nothing is scored")
    reward_model: Text | None = key("models/rm", "folder of the reward model; null with policies: []")
    judge: Text | None = key(
        "models/rm",
        "folder of a second reward model, such as one trained on other pairs, which over-optimisation is measured by "
        "where prompts have no grade by a task; that of reward_model itself: none takes part",
    )
    judge_head: Text | None = key(None, "of the judge, as reward_head")
    judge_label: Text | WholeNumber | None = key(None, "of the judge, as reward_label")
    max_pairs: Count | None = key(
        1500,
        "of the test pairs, whose replies give the line that relates the score to the grade or the judge's "
        "score; null: all of them",
        unit="pairs",
    )
    seed: Seed | None = key(None, "of the intervals; null: the common seed")
    precision: Precision = key("fp32", "of weights and activations")
    bootstrap_resamples: Resamples = key(2000, "of the confidence intervals")

    @model_validator(mode="after")
    def _check(self) -> "ScoreSamples":
        if self.policies and self.reward_model is None:
            raise ValueError("reward_model must name a folder where policies are scored, found nothing")
        if self.policies and self.judge is None:
            raise ValueError(f"judge must name a folder, {self.reward_model} where none takes part, found nothing")
        unused = [name for name in ("judge_head", "judge_label") if getattr(self, name) is not None]
        if unused and "judge" not in self.reward_models:
            raise ValueError(f"{unused[0]}: judge is reward_model, so no second reward model is read; set null")
        if len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies must name each policy once, found {', '.join(self.policies)}")
        return self

    @property
    def reward_models(self) -> dict[str, str]:
        """The folder of the reward model and, if one takes part, of the judge, by what their scores are called."""
        folders = {"reward": str(self.reward_model), "judge": str(self.judge)}
        same = os.path.normpath(folders["judge"]) == os.path.normpath(folders["reward"])
        return {"reward": folders["reward"]} if same else folders

    def reading_of(self, measure: str) -> RewardReading:
        """How one of them is read."""
        if measure == "reward":
            return self
        return RewardReading(reward_head=self.judge_head, reward_label=self.judge_label)
