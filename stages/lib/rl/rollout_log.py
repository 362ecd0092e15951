"""The log of what a policy wrote in training: a line of JSON for each response, and what the lines add up to.

A file of lines can be cut where a checkpoint was made; what is published of it is one table (`publish`).
"""

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from stages.lib.data.chat import load_tokenizer
from stages.lib.data.prompts import json_text
from stages.lib.rl.rollouts import Rollouts

SUMMED = ("iteration", "sample", "response_ids", "score", "kl", "ended")
TOKEN_IDS = pa.list_(pa.int32())
TYPES = {"iteration": pa.int64(), "row": pa.int64(), "sample": pa.int32(), "length": pa.int32(), "ended": pa.bool_()}
TYPES |= dict.fromkeys(("logps", "engine_logps"), pa.list_(pa.float32()))
TYPES |= {"prompt_ids": TOKEN_IDS, "response_ids": TOKEN_IDS}
TYPES |= dict.fromkeys(("source", "facts", "prompt", "response"), pa.string())  # numbers are all others
ROWS_TOGETHER = 1024


class RolloutLog:
    """All responses of a run, phase by phase.

    Args:
        path: of the file, or None in a process that writes none.
        tokenizer_from: folder of the policy's tokenizer; special tokens stay visible in the log.
        with_samples: a prompt has several, which are compared in the results.
    """

    def __init__(self, path: Path | None, tokenizer_from: Path, *, with_samples: bool = False) -> None:
        self.path = path
        self.with_samples = with_samples
        self.tokenizer = load_tokenizer(tokenizer_from)

    def append(
        self,
        iteration: int,
        rollouts: Rollouts,
        kl: torch.Tensor | None,
        advantages: torch.Tensor | None = None,
    ) -> None:
        """Add the responses of a phase (0-based).

        Args:
            kl: of each token, (b, t), if there is a reference.
            advantages: of each token, (b, t), if there are any.
        """
        if self.path is None:
            return
        lengths = rollouts.response_mask.sum(dim=-1)
        columns = {"score": rollouts.scores, **{f"rewards/{name}": part for name, part in rollouts.parts.items()}}
        columns |= {} if advantages is None else {"advantage": advantages.sum(dim=-1) / lengths}
        columns |= {} if kl is None else {"kl": kl.sum(dim=-1)}
        numbers = zip(*(column.tolist() for column in columns.values()), strict=True)
        with self.path.open("a", encoding="utf-8") as file:
            for row, (episode, values) in enumerate(zip(rollouts.episodes, numbers, strict=True)):
                length = len(episode.ids)
                record = {
                    "iteration": iteration + 1,
                    "row": episode.prompt.row,
                    "sample": episode.sample,
                    "source": episode.prompt.source,
                    "facts": json_text(episode.prompt.facts),
                    "prompt": self._text(episode.prompt.ids),
                    "prompt_ids": episode.prompt.ids,
                    "response": self._text(episode.ids),
                    "response_ids": episode.ids,
                    "length": length,
                    "ended": episode.ended,
                }
                record |= {name: six_digits(value) for name, value in zip(columns, values, strict=True)}
                if rollouts.engine_logps is not None:  # beside each other, token by token
                    both = {"logps": rollouts.logps, "engine_logps": rollouts.engine_logps}
                    record |= {name: [*map(six_digits, logps[row, :length].tolist())] for name, logps in both.items()}
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
            own: dict[int, list[dict[str, Any]]] = {}  # of the first phase and of the last one so far
            count = 0
            for line in lines:
                count += 1
                rollout = {name: value for name, value in json.loads(line).items() if name in SUMMED}
                phase = rollout["iteration"]
                if phase not in own and len(own) == 2:
                    own.popitem()
                own.setdefault(phase, []).append(rollout)
        found: dict[str, float] = {"rollouts": count}
        for name, phase in (("first", min(own)), ("last", max(own))):
            rollouts = own[phase]
            for key in ("score", "kl", "ended") if "kl" in rollouts[0] else ("score", "ended"):
                found[f"{name}_{key}_mean"] = sum(rollout[key] for rollout in rollouts) / len(rollouts)
            if self.with_samples:
                found |= {f"{name}_{key}": value for key, value in shares_of_groups(rollouts).items()}
        return found

    def publish(self, out: Path) -> None:
        """Write all responses as a Parquet table, a row each in the order of the log; nothing without a file."""
        import pyarrow.parquet as pq

        if self.path is None:
            return
        with self.path.open(encoding="utf-8") as lines:
            names = [*json.loads(next(lines))]
            lines.seek(0)
            schema = pa.schema([(name, TYPES.get(name, pa.float64())) for name in names])
            with pq.ParquetWriter(out, schema, compression="zstd") as writer:
                while some := [json.loads(line) for line in islice(lines, ROWS_TOGETHER)]:
                    writer.write_table(pa.Table.from_pylist(some, schema=schema))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def six_digits(value: float) -> float | None:
    """To 6 digits; None for NaN, which a reward says where it does not apply."""
    return None if math.isnan(value) else round(value, 6)


def shares_of_groups(rollouts: list[dict[str, Any]]) -> dict[str, float]:
    """Of a prompt's responses the share that differ, and the share of prompts whose responses are all scored alike."""
    starts = [place for place, rollout in enumerate(rollouts) if rollout["sample"] == 0]
    groups = [rollouts[start:end] for start, end in zip(starts, [*starts[1:], len(rollouts)], strict=True)]
    distinct = sum(len({tuple(rollout["response_ids"]) for rollout in group}) for group in groups)
    alike = sum(len({(rollout["score"], rollout["ended"]) for rollout in group}) == 1 for group in groups)
    return {"distinct_share": distinct / len(rollouts), "without_variance_share": alike / len(groups)}
