"""The rewards of an entry beside its reward model, by name, each type with the keys it has."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from stages.lib.command.wrong_values import FUNCTION_PATH, REWARD_FILE
from stages.lib.settings.bounds import Count, Name, NotNegative, Positive, Several, Text
from stages.lib.settings.declaration import key
from stages.lib.settings.reward_part import RewardPart, RowsWhere, Weight
from stages.lib.settings.reward_reading import RewardSettings
from stages.lib.settings.served_rewards import JudgeReward, RemoteReward

REWARD_MODEL, SUM = "reward_model", "sum"  # names of the reward model, and of the sum, among rewards
DataFile = Annotated[str, StringConstraints(pattern=REWARD_FILE, max_length=500)]
FunctionPath = Annotated[str, StringConstraints(pattern=FUNCTION_PATH, max_length=500)]


class FunctionReward(RewardPart):
    """A function of the user's own."""

    type: Literal["function"] = key("function", "a Python function below rewards/")
    path: FunctionPath = key("rewards/example.py:score", "file and function")
    files: Several[DataFile] = key(
        [], "what it reads of rewards/, such as [rewards/words.txt]: other contents count as another function"
    )
    seconds: Positive = key(10.0, "for one response; what takes longer is ended", unit="seconds")


class MathReward(RewardPart):
    """1 for an answer that is mathematically equal to the row's, else 0."""

    type: Literal["math"] = key("math", "1 for the right answer, else 0, by math-verify")
    missing: Literal["stop", "skip"] = key(
        "skip", "where an answer cannot be compared in time, or at all: stop: end the run | skip: count it; it is 0"
    )
    answer: Text = key("answer", "the fact that holds the right answer")
    answer_after: Text | None = key(None, "of the fact, the answer is what follows this, such as ####; null: all of it")
    read: Literal["anywhere", "boxed", "after"] = key(
        "anywhere",
        "of the response: anywhere: its last formula or number | boxed: what is in its last \\boxed{} | after: what "
        "follows the last answer_after in it",
    )
    seconds: Positive = key(5.0, "for one response", unit="seconds")

    @model_validator(mode="after")
    def _check_mark(self) -> Self:
        if self.read == "after" and self.answer_after is None:
            raise ValueError("read: after needs answer_after, which says after what")
        return self


class FinalAnswerReward(RewardPart):
    """1 for one final answer that is the row's, letter by letter, else 0."""

    type: Literal["final_answer"] = key(
        "final_answer", "1 for a finished response that ends in its only mark and the right answer, else 0"
    )
    answer: Text = key("answer", "the fact that holds the right answer, a text or a whole number")
    mark: Text = key("####", "what stands before the answer; all that follows it in a response is the answer")


def expression(text: str) -> str:
    """Raise ValueError unless Python's re can read it."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
    return text


class FormatReward(RewardPart):
    """1 for a response of a form, else 0."""

    type: Literal["format"] = key("format", "1 for a response that a regular expression matches, else 0")
    pattern: Annotated[Text, AfterValidator(expression)] = key(
        r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*",
        "of Python's re, which matches the whole response; a dot matches line ends, too",
    )
    seconds: Positive = key(1.0, "for one response", unit="seconds")


def longest() -> Count | None:
    """Declare the length from which a response is as long as can be."""
    return key(None, "null: max_new_tokens", unit="tokens")


class CosineLengthReward(RewardPart):
    """A score that goes by the length: short right answers and long wrong ones are the better ones."""

    type: Literal["cosine_length"] = key(
        "cosine_length",
        "by length, along a cosine, from one value to another: its ends for right and for wrong answers",
        source="arXiv 2502.03373, section 3.1 and appendix",
    )
    judged_by: Name = key("answer", "the entry of rewards that says what is right: a score above 0.5")
    right_from: Weight = key(2.0, "of a right answer of length 0")
    right_to: Weight = key(1.0, "of a right answer of length longest")
    wrong_from: Weight = key(-10.0, "of a wrong answer of length 0")
    wrong_to: Weight = key(0.0, "of a wrong answer of length longest")
    exceeding: Weight = key(-10.0, "of a response of length longest or above")
    longest: Count | None = longest()


class RepetitionReward(RewardPart):
    """What is taken off for repeated n-grams."""

    type: Literal["repetition"] = key(
        "repetition",
        "−penalty × the share of n-grams that are repetitions of earlier ones",
        source="arXiv 2502.03373, as in open-r1",
    )
    n: Count = key(20, "of the n-grams", unit="tokens")
    penalty: NotNegative = key(1.0, "of a response that is nothing but repetition")


class OverlongReward(RewardPart):
    """What is taken off near the limit of tokens."""

    type: Literal["overlong"] = key(
        "overlong",
        "−penalty, rising linearly over the last buffer tokens before longest",
        source="DAPO, arXiv 2503.14476, Eq 13",
    )
    buffer: Count = key(16, "below longest in which the penalty rises", unit="tokens")
    penalty: NotNegative = key(1.0, "of a response of length longest")
    longest: Count | None = longest()


AnyReward = Annotated[
    FunctionReward
    | MathReward
    | FinalAnswerReward
    | FormatReward
    | CosineLengthReward
    | RepetitionReward
    | OverlongReward
    | RemoteReward
    | JudgeReward,
    Field(discriminator="type"),
]


def refuse_unjudged(rewards: Mapping[str, AnyReward]) -> None:
    """Raise ValueError for a name that is a reward model's, or a reward whose judge is none."""
    for taken, why in ((REWARD_MODEL, "the reward model's score"), (SUM, "the sum of all")):
        if taken in rewards:
            raise ValueError(f"rewards must not have the name {taken}, which {why} has")
    for name, reward in rewards.items():
        judge = reward.judged_by if isinstance(reward, CosineLengthReward) else None
        if judge is not None and isinstance(rewards.get(judge), CosineLengthReward | None):
            raise ValueError(f"rewards.{name}.judged_by must name a reward of another type, and {judge} is none")


class MixedRewards(RewardSettings):
    """Of a section whose reward is a sum: the score of a reward model, and what these rewards say."""

    reward_model: Text = key("models/rm", "folder of the reward model; that of model itself: none takes part")
    reward_model_weight: NotNegative = key(1.0, "of the reward model's score in the sum")
    reward_model_where: RowsWhere | None = key(None, "the rows that the reward model scores; null: all")
    rewards: dict[Name, AnyReward] = key({}, "more of the reward, by name: functions, verifiers, rules")

    @model_validator(mode="after")
    def _check_rewards(self) -> Self:
        refuse_unjudged(self.rewards)
        has_weight = any(reward.weight for reward in self.rewards.values())
        if self.has_reward_model:
            if not self.reward_model_weight and not has_weight:
                raise ValueError("reward_model_weight is 0, so rewards must have one of a weight")
            return self
        if not has_weight:
            raise ValueError(
                "reward_model names model itself, so that none takes part; then rewards must have one of a weight"
            )
        reading = (self.reward_head, self.reward_label, self.standardise_reward, self.reward_model_weight)
        if (*reading, self.reward_model_where) != (None, None, False, 1.0, None):
            raise ValueError(
                "reward_model names model itself, so that none takes part: set reward_head, reward_label and "
                "reward_model_where to null, standardise_reward to false, reward_model_weight to 1.0"
            )
        return self

    @property
    def has_reward_model(self) -> bool:
        """Whether one takes part: DVC cannot depend on nothing, so the entry's own model stands for none."""
        return os.path.normpath(self.reward_model) != os.path.normpath(getattr(self, "model", ""))
