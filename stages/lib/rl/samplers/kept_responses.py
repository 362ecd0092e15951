"""Responses of an engine that never gives the same ones twice, kept in the scratch folder until their run is done.

A run that is killed between sampling and its next checkpoint then goes on with the responses that it had.
"""

from collections.abc import Sequence

from stages.lib.command.hashing import value_hash
from stages.lib.data.prompts import Prompt
from stages.lib.rl.rewards.kept_answers import KeptAnswers
from stages.lib.rl.samplers.vllm_connection import Completion


class KeptResponses:
    """Responses by what they are to. Main process only.

    Args:
        answers: of this run.
        code: hash of the code that samples.
    """

    def __init__(self, answers: KeptAnswers, code: str) -> None:
        self.answers = answers
        self.code = code

    def keys(self, prompts: Sequence[Prompt], step: int, samples: int, updates: int) -> list[str]:
        """What identifies the samples of each prompt.

        Args:
            step: of training.
            updates: optimizer steps that the policy has behind it.
        """
        of_all = [self.code, step, samples, updates]
        return [value_hash([*of_all, place, prompt.row, prompt.ids]) for place, prompt in enumerate(prompts)]

    def find(self, keys: Sequence[str]) -> dict[str, list[Completion]]:
        """The samples that are there, by their keys."""
        return {key: [Completion(*sample) for sample in kept] for key, kept in self.answers.find(keys).items()}

    def add(self, found: dict[str, list[Completion]]) -> None:
        """Keep the samples of some prompts."""
        self.answers.add(dict(found))
