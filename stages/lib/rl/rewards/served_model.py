"""What a server answers with: a reward model's scores of rendered queries, or of conversations that it renders."""

import math
from collections.abc import Sequence
from pathlib import Path

from stages.lib.command.errors import StageError
from stages.lib.compute.sequence_scores import all_scores
from stages.lib.data.chat import Context
from stages.lib.data.conversations import messages_from
from stages.lib.data.reward_texts import RewardTexts
from stages.lib.rl.rewards.reward_model import RewardModel
from stages.lib.rl.rewards.reward_service import Asked, AskedReply


class ServedModel:
    """A reward model as a `Scorer`.

    Args:
        folder: of the model.
    """

    def __init__(self, model: RewardModel, folder: Path, *, trust_remote_code: bool) -> None:
        self.model = model
        self.folder = folder
        self.query_texts = model.texts or RewardTexts(folder, trust_remote_code=trust_remote_code)

    def __call__(self, rows: Sequence[Asked]) -> list[float]:
        """The score of each row. Raises StageError if one cannot be encoded, or its score is NaN or infinite."""
        queries = [row for row in rows if isinstance(row, str)]
        replies = [row for row in rows if isinstance(row, AskedReply)]
        of_queries, of_replies = iter(self.of_queries(queries)), iter(self.of_replies(replies))
        scores = [next(of_queries) if isinstance(row, str) else next(of_replies) for row in rows]
        for row, score in zip(rows, scores, strict=True):
            if not math.isfinite(score):
                text = row if isinstance(row, str) else row.reply
                raise StageError(f"{self.folder} is broken: its score of {text[:60]!r} is {score}")
        return scores

    def of_queries(self, queries: Sequence[str]) -> list[float]:
        """The scores of prompts with replies, each one rendered text."""
        ids = [self.query_texts.encode_query(query) for query in queries]
        scores = all_scores(self.model.scores, [[]] * len(ids), ids, self.model.batching) if ids else []
        return scores if self.model.scale is None else self.model.scale.standardised(scores)

    def of_replies(self, replies: Sequence[AskedReply]) -> list[float]:
        """The scores of replies to prompts that the model renders."""
        if not replies:
            return []
        prompts = [
            row.prompt if isinstance(row.prompt, str) else messages_from(row.prompt, f"conversation {place}, prompt")
            for place, row in enumerate(replies)
        ]
        contexts = [Context(row.tools, row.template_arguments) for row in replies]
        ended = [row.ended for row in replies]
        return self.model.score_texts(prompts, [row.reply for row in replies], ended, contexts)
