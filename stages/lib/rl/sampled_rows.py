"""Rows of token tables made of sampled replies, the samples beside them as text, and what there is to count."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from stages.lib.data.prompts import Prompt, json_text
from stages.lib.data.token_tables import PREFERENCE_SCHEMA, SFT_SCHEMA
from stages.lib.rl.ranked_replies import PROMPTS_WITHOUT, Pair, ScoredReply, best_reply, gap_of, pairs_of
from stages.lib.settings.sample_pairs import BestOfN, MadeRows

SCHEMAS = {"preference": PREFERENCE_SCHEMA, "sft": SFT_SCHEMA}


class SampledRows:
    """`rows` of a token table, each numbered by its place, and `samples`: a record of each prompt with its replies."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []

    def add(self, prompt: Prompt, replies: Sequence[ScoredReply], makes: MadeRows, dropped: Counter[str]) -> None:
        """Add what is made of the replies to a prompt; what is left out is added to `dropped` by reason."""
        made: list[dict[str, int]] = []
        if isinstance(makes, BestOfN):
            best = best_reply(replies, makes, dropped)
            if best is not None:
                made.append({"row": len(self.rows), "best": best})
                self.rows.append(sft_row(len(self.rows), prompt, replies[best]))
        else:
            for pair in pairs_of(replies, makes, dropped):
                made.append({"row": len(self.rows), **pair._asdict()})
                self.rows.append(pair_row(len(self.rows), prompt, replies, pair))
        dropped[PROMPTS_WITHOUT] += not made
        self.samples.append(sample_record(prompt, replies, made))

    def shown(self, count: int) -> list[str]:
        """The first prompts of which a row was made: lines with scores and texts of the replies in it."""
        lines = []
        for sample in [sample for sample in self.samples if sample["made"]][:count]:
            for name, place in sample["made"][0].items():
                if name != "row":
                    reply = sample["replies"][place]
                    lines.append(f"    {name:<8}  score {reply['score']:+.2f}  {reply['text']!r}")
        return lines


def pair_row(row: int, prompt: Prompt, replies: Sequence[ScoredReply], pair: Pair) -> dict[str, Any]:
    """A row of `PREFERENCE_SCHEMA`; the margin is the difference of the scores."""
    return {
        "row": row,
        "prompt_ids": prompt.ids,
        "chosen_ids": replies[pair.chosen].ids,
        "rejected_ids": replies[pair.rejected].ids,
        "margin": gap_of(replies, pair),
        "source": prompt.source,
    }


def sft_row(row: int, prompt: Prompt, reply: ScoredReply) -> dict[str, Any]:
    """A row of `SFT_SCHEMA`, of which the reply is trained."""
    return {
        "row": row,
        "input_ids": [*prompt.ids, *reply.ids],
        "loss_mask": [False] * len(prompt.ids) + [True] * len(reply.ids),
        "messages": json_text(prompt.messages),
        "context": json_text(prompt.context),
        "source": prompt.source,
    }


def sample_record(prompt: Prompt, replies: Sequence[ScoredReply], made: list[dict[str, int]]) -> dict[str, Any]:
    """A prompt with all replies to it; `made`: the rows made of them, with the places of the replies in them."""
    return {
        "prompt_row": prompt.row,
        "source": prompt.source,
        "prompt": prompt.shown,
        "replies": [
            {"text": reply.text, "score": round(reply.score, 6), "ended": reply.ended, "length": len(reply.ids)}
            for reply in replies
        ],
        "made": made,
    }


def sample_metrics(
    replies: Sequence[Sequence[ScoredReply]], rows: Sequence[Mapping[str, Any]], dropped: Mapping[str, int]
) -> dict[str, float]:
    """What was sampled and what became of it.

    Args:
        replies: to each prompt.
        rows: those made of them.
        dropped: how often each reason left something out.
    """
    scores = [[reply.score for reply in group] for group in replies]
    every = [reply for group in replies for reply in group]
    results: dict[str, float] = {"prompts": len(replies), "replies": len(every), "rows": len(rows)}
    results |= {
        "reward_mean": fmean([reply.score for reply in every]),
        "reward_best_mean": fmean([max(group) for group in scores]),
        "reward_worst_mean": fmean([min(group) for group in scores]),
        "replies_distinct_share": fmean([len({reply.text for reply in group}) / len(group) for group in replies]),
        "prompts_of_equal_scores_share": fmean([float(min(group) == max(group)) for group in scores]),
        "eos_rate": fmean([float(reply.ended) for reply in every]),
        "length_mean": fmean([len(reply.ids) for reply in every]),
    }
    for name in ("chosen", "rejected"):
        lengths = [len(row[f"{name}_ids"]) for row in rows if f"{name}_ids" in row]
        results |= {f"{name}_length_mean": fmean(lengths)} if lengths else {}
    gaps = [row["margin"] for row in rows if "margin" in row]
    results |= {"margin_mean": fmean(gaps)} if gaps else {}
    return results | {f"dropped/{reason}": count for reason, count in sorted(dropped.items())}
