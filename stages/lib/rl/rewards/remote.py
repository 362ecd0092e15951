"""The reward of a server that speaks OpenRLHF's POST /get_reward, such as `make serve-rm`.

    {"query": [text, …], "prompts": [text, …], "labels": [text, …], "conversations": […]}  →  {"rewards": [number, …]}

A query is a prompt with its response as the policy's tokens are written, special tokens among them. `conversations` is
ours: the same as messages, which a server of ours renders by its reward model's own template; others pass it over.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import value_hash
from stages.lib.command.json_schema import LARGEST_NUMBER
from stages.lib.compute.processes import Processes
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.kept_answers import KeptAnswers
from stages.lib.rl.rewards.scoring import Failure, RewardScore
from stages.lib.rl.rewards.server_calls import Caller, NoAnswerError, ServerCalls, asked_by_main
from stages.lib.settings.served_rewards import RemoteReward

Question = dict[str, Any]


class RemoteScores:
    """A `Reward`: what a server says, asked by the main process.

    Args:
        decode: writes token ids as text, special tokens among them.
        kept: what was answered before.
    """

    def __init__(
        self,
        settings: RemoteReward,
        calls: ServerCalls,
        decode: Callable[[list[int]], str],
        processes: Processes,
        kept: KeptAnswers,
    ) -> None:
        self.settings = settings
        self.calls = calls
        self.decode = decode
        self.processes = processes
        self.kept = kept

    def __call__(self, episodes: Sequence[Episode]) -> list[RewardScore]:
        """As `Reward` says. Raises RewardError if the server is of another revision, or has an episode no label."""
        return asked_by_main(self.processes, lambda: self._scores(episodes))

    def _scores(self, episodes: Sequence[Episode]) -> list[RewardScore]:
        questions = [self.question(episode) for episode in episodes]
        keys = [value_hash([self.settings.server, self.settings.revision, question]) for question in questions]
        known: dict[str, RewardScore] = {**self.kept.find(keys)}
        open_keys = list(dict.fromkeys(key for key in keys if key not in known))
        question_of = dict(zip(keys, questions, strict=True))
        size = self.calls.server.rows_per_request
        parts = [open_keys[start : start + size] for start in range(0, len(open_keys), size)]

        async def ask(caller: Caller, part: list[str]) -> dict[str, RewardScore]:
            rewards = await self.rewards(caller, [question_of[key] for key in part])
            given = dict(zip(part, rewards, strict=True))
            usable = {key: reward for key, reward in given.items() if not isinstance(reward, Failure)}
            return given | self.kept.add(usable)

        stop = self.settings.missing == "stop"
        for part, found in zip(parts, self.calls.for_each(parts, ask, stop_at_failure=stop), strict=True):
            known |= dict.fromkeys(part, found) if isinstance(found, Failure) else found
        return [known[key] for key in keys]

    def question(self, episode: Episode) -> Question:
        """What a server is told of an episode."""
        context = episode.prompt.context
        conversation = {"prompt": episode.prompt.shown, "reply": episode.text, "ended": episode.ended}
        conversation |= {name: context[name] for name in ("tools", "template_arguments") if context.get(name)}
        return {
            "query": self.decode([*episode.prompt.ids, *episode.ids]),
            "prompt": self.decode(episode.prompt.ids),
            "label": self._label(episode),
            "conversation": conversation,
        }

    def _label(self, episode: Episode) -> str:
        fact = self.settings.label
        if fact is None:
            return ""
        if fact not in episode.prompt.facts:
            raise StageError(f"row {episode.prompt.row} of the prompts has no fact {fact!r}, which label names")
        value = episode.prompt.facts[fact]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)

    async def rewards(self, caller: Caller, questions: Sequence[Question]) -> list[RewardScore]:
        """What the server answers to these. Raises NoAnswerError, or StageError if it is of another revision."""
        body = {
            "query": [question["query"] for question in questions],
            "prompts": [question["prompt"] for question in questions],
            "labels": [question["label"] for question in questions],
            "conversations": [question["conversation"] for question in questions],
        }
        answer = await caller.post(self.calls.server.address, body)
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(questions):
            count = f"{len(rewards)} rewards" if isinstance(rewards, list) else "no list of rewards"
            raise NoAnswerError(f"{caller.shown} answers with {count} to {len(questions)} responses")
        revision = answer.get("revision")
        if isinstance(revision, str) and revision != self.settings.revision:
            raise StageError(
                f"{caller.shown} has the revision {revision!r:.100}, and params.yaml names "
                f"{self.settings.revision!r}: let it serve that one, or name the other"
            )
        return [self._reward(caller, reward) for reward in rewards]

    def _reward(self, caller: Caller, reward: Any) -> RewardScore:
        if type(reward) not in (int, float) or not abs(reward) <= LARGEST_NUMBER:
            return Failure(
                "error", f"{caller.shown} gives {reward!r:.60}; expected a number within ±{LARGEST_NUMBER:g}"
            )
        return float(reward)
