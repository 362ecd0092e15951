"""Test pairs scored by a reward model, of which one with the pipeline's tokenizer reads ids, another text."""

import math
from collections.abc import Sequence
from pathlib import Path

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import read_jsonl
from stages.lib.data.conversation_rows import Conversation, preference_conversation
from stages.lib.rl.rewards.reward_model import RewardModel

SIDES = ("chosen", "rejected")


def texts_of_pairs(prepared: Path, rows: Sequence[int]) -> list[Conversation]:
    """The prepared rows. Raises StageError for one that is no pair, or if the table's `rows` are not among them."""
    lines = enumerate(read_jsonl(prepared), start=1)
    texts = [preference_conversation(row, f"{prepared}, line {line}") for line, row in lines]
    if max(rows) >= len(texts):
        raise StageError(f"{prepared} has {len(texts)} rows, and the tokens are of more: run tokenize_data again")
    return texts


def scores_of_pairs(
    reward: RewardModel, pairs: dict[str, list], texts: Sequence[Conversation] | None, where: Path
) -> dict[str, list[float]]:
    """The scores of both replies of each pair, by its side.

    Args:
        pairs: columns of the token table, of which `row` is the place in `texts`.
        texts: the prepared rows; a reward model that reads ids needs none.
        where: the token table.
    Raises:
        StageError: a score is not a finite number (it names the row).
    """
    if reward.texts is None:
        found = dict(reward.score_id_pairs(pairs)._asdict())
    else:
        assert texts is not None, "this reward model reads text"
        rows = [texts[row] for row in pairs["row"]]
        prompts, contexts = [row.prompt for row in rows], [row.context for row in rows]
        found = {
            side: reward.score_texts(prompts, [row.replies[place] for row in rows], contexts=contexts)
            for place, side in enumerate(SIDES)
        }
    for values in found.values():
        for row, score in zip(pairs["row"], values, strict=True):
            if not math.isfinite(score):
                broken = reward.facts.path if reward.facts else "the reward model"
                raise StageError(f"{where}, row {row}: a score is {score}; {broken} is broken")
    return found
