"""The log of what a policy wrote in training: a line of JSON for each response, and what the lines add up to."""

import json
from pathlib import Path
from typing import Any

import torch

from stages.lib.data.chat import load_tokenizer
from stages.lib.rl.rollouts import Rollouts


class RolloutLog:
    """All responses of a run, phase by phase.

    Args:
        path: of the file, or None in a process that writes none.
        tokenizer_from: folder of the policy's tokenizer; special tokens stay visible in the log.
        with_samples: a line says which of a prompt's samples it is.
    """

    def __init__(self, path: Path | None, tokenizer_from: Path, *, with_samples: bool = False) -> None:
        self.path = path
        self.with_samples = with_samples
        self.tokenizer = load_tokenizer(tokenizer_from)

    def append(self, iteration: int, rollouts: Rollouts, kl: torch.Tensor | None) -> None:
        """Add the responses of a phase (0-based); `kl` is that of each token, (b, t), if there is a reference."""
        if self.path is None:
            return
        sums = [None] * len(rollouts.episodes) if kl is None else kl.sum(dim=-1).tolist()
        numbers = zip(rollouts.episodes, rollouts.scores.tolist(), sums, strict=True)
        with self.path.open("a", encoding="utf-8") as file:
            for episode, score, divergence in numbers:
                record = {
                    "iteration": iteration + 1,
                    "row": episode.prompt.row,
                    **({"sample": episode.sample} if self.with_samples else {}),
                    "response": self._text(episode.ids),
                    "response_ids": episode.ids,
                    "score": round(score, 6),
                    **({} if divergence is None else {"kl": round(divergence, 6)}),
                    "ended": episode.ended,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def samples(self, rollouts: Rollouts, kl: torch.Tensor | None, count: int) -> list[str]:
        """The first responses of a phase with score and KL, a line each."""
        shown = [""] * count if kl is None else [f"kl {total:+.2f}  " for total in kl.sum(dim=-1).tolist()]
        numbers = zip(rollouts.episodes[:count], rollouts.scores.tolist(), shown, strict=False)
        return [
            f"    score {score:+.2f}  {divergence}{self._text(episode.ids)!r}" for episode, score, divergence in numbers
        ]

    def results(self) -> dict[str, float]:
        """How many responses there are, and their means in the first and in the last phase; {} without a file."""
        if self.path is None:
            return {}
        with self.path.open(encoding="utf-8") as lines:
            rollouts = [json.loads(line) for line in lines]
        found: dict[str, float] = {"rollouts": len(rollouts)}
        for name, phase in (("first", rollouts[0]["iteration"]), ("last", rollouts[-1]["iteration"])):
            own = [rollout for rollout in rollouts if rollout["iteration"] == phase]
            for key in ("score", "kl", "ended") if "kl" in own[0] else ("score", "ended"):
                found[f"{name}_{key}_mean"] = sum(rollout[key] for rollout in own) / len(own)
            if self.with_samples:
                found |= {f"{name}_{key}": value for key, value in shares_of_groups(own).items()}
        return found

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def shares_of_groups(rollouts: list[dict[str, Any]]) -> dict[str, float]:
    """Of a prompt's responses the share that differ, and the share of prompts whose responses are all scored alike."""
    starts = [place for place, rollout in enumerate(rollouts) if rollout["sample"] == 0]
    groups = [rollouts[start:end] for start, end in zip(starts, [*starts[1:], len(rollouts)], strict=True)]
    distinct = sum(len({tuple(rollout["response_ids"]) for rollout in group}) for group in groups)
    alike = sum(len({(rollout["score"], rollout["ended"]) for rollout in group}) == 1 for group in groups)
    return {"distinct_share": distinct / len(rollouts), "without_variance_share": alike / len(groups)}
