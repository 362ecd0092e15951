"""A language model as judge, behind an OpenAI-compatible endpoint (POST …/chat/completions).

It is told a rubric with the row's prompt, response and facts in it, and ends its answer with `Score: n`. Answers that
have a score are kept as text, so another scale asks nothing again.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import value_hash
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import json_text
from stages.lib.data.reward_texts import said_in
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.kept_answers import KeptAnswers
from stages.lib.rl.rewards.scoring import Failure, RewardScore, told_episode
from stages.lib.rl.rewards.server_calls import Caller, NoAnswerError, ServerCalls, asked_by_main
from stages.lib.settings.served_rewards import JudgeReward

PLACE = re.compile(r"\{(\w+)\}")
SCORE = re.compile(r"\bscore\W{0,8}?\s*[:=]\W{0,8}?(-?\d+(?:\.\d+)?)", re.IGNORECASE)
ROUTE = "/chat/completions"


class JudgeScores:
    """A `Reward`: (score − lowest) / (highest − lowest), by what a language model answers to the main process."""

    def __init__(self, settings: JudgeReward, calls: ServerCalls, processes: Processes, kept: KeptAnswers) -> None:
        self.settings = settings
        self.calls = calls
        self.processes = processes
        self.kept = kept

    def __call__(self, episodes: Sequence[Episode]) -> list[RewardScore]:
        """As `Reward` says. Raises RewardError for a fact that the rubric names and a row lacks."""
        return asked_by_main(self.processes, lambda: self._scores(episodes))

    def _scores(self, episodes: Sequence[Episode]) -> list[RewardScore]:
        bodies = [self.body(episode) for episode in episodes]
        keys = [value_hash(["judge", self.settings.server, self.settings.revision, body]) for body in bodies]
        known: dict[str, str | Failure] = {**self.kept.find(keys)}
        body_of = {key: body for key, body in zip(keys, bodies, strict=True) if key not in known}

        async def ask(caller: Caller, key: str) -> str:
            answer = text_of_answer(
                caller, await caller.post(self.calls.server.address.rstrip("/") + ROUTE, body_of[key])
            )
            return answer if isinstance(self.score(answer), Failure) else self.kept.add({key: answer})[key]

        stop = self.settings.missing == "stop"
        known |= dict(zip(body_of, self.calls.for_each([*body_of], ask, stop_at_failure=stop), strict=True))
        return [self.score(known[key]) for key in keys]

    def body(self, episode: Episode) -> dict[str, Any]:
        """The request for an episode, on which, with the revision, its answer depends."""
        return {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": filled(self.settings.rubric, episode)}],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        }

    def score(self, answer: str | Failure) -> RewardScore:
        """What an answer gives."""
        if isinstance(answer, Failure):
            return answer
        found = SCORE.findall(answer)
        score = float(found[-1]) if found else math.nan
        if not self.settings.lowest <= score <= self.settings.highest:
            said = f"the score {score:g}" if found else "no line `Score: n`"
            return Failure("error", f"the judge's answer has {said}: {answer[-100:]!r}")
        return (score - self.settings.lowest) / (self.settings.highest - self.settings.lowest)


def filled(rubric: str, episode: Episode) -> str:
    """A rubric with an episode's texts in their places; braces in those texts stay as they are."""
    shown = episode.prompt.shown
    prompt = shown if isinstance(shown, str) else "\n\n".join(f"{turn['role']}: {said_in(turn)}" for turn in shown)
    texts = {**episode.prompt.facts, "prompt": prompt, "response": episode.text}

    def text_at(place: re.Match[str]) -> str:
        if place[1] not in texts:
            raise StageError(f"{told_episode(episode)}: the row has no fact {place[1]!r}, which the rubric names")
        value = texts[place[1]]
        return value if isinstance(value, str) else json_text(value)

    return PLACE.sub(text_at, rubric)


def text_of_answer(caller: Caller, answer: Any) -> str:
    """The content of the message in a chat completion. Raises NoAnswerError if it has none."""
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise NoAnswerError(f"{caller.shown} gives no message in choices[0]: {answer!r:.200}")
    return content
