"""The log of what a policy wrote in training: a line of JSON for each response, and what the lines add up to."""

import json
from pathlib import Path

from stages.lib.data.chat import load_tokenizer
from stages.lib.rl.rollouts import Rollouts


class RolloutLog:
    """All responses of a run, phase by phase.

    Args:
        path: of the file, or None in a process that writes none.
        tokenizer_from: folder of the policy's tokenizer; special tokens stay visible in the log.
    """

    def __init__(self, path: Path | None, tokenizer_from: Path) -> None:
        self.path = path
        self.tokenizer = load_tokenizer(tokenizer_from)

    def append(self, iteration: int, rows: list[int], batch: Rollouts) -> None:
        """Add the responses of a phase (0-based) to the prompts in these rows of the data."""
        if self.path is None:
            return
        kl = batch.kl.sum(dim=-1).tolist()
        with self.path.open("a", encoding="utf-8") as file:
            for index, row in enumerate(rows):
                record = {
                    "iteration": iteration + 1,
                    "row": row,
                    "response": self._text(batch.responses[index]),
                    "response_ids": batch.responses[index],
                    "score": round(float(batch.scores[index]), 6),
                    "kl": round(kl[index], 6),
                    "ended": bool(batch.ended[index]),
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def samples(self, batch: Rollouts, count: int) -> list[str]:
        """The first responses of a phase with score and KL, a line each."""
        return [
            f"    score {score:+.2f}  kl {kl:+.2f}  {self._text(response)!r}"
            for score, kl, response in zip(
                batch.scores.tolist(), batch.kl.sum(dim=-1).tolist(), batch.responses[:count], strict=False
            )
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
            for key in ("score", "kl", "ended"):
                found[f"{name}_{key}_mean"] = sum(rollout[key] for rollout in own) / len(own)
        return found

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)
