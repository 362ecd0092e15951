"""Supervised rows in the updates of a policy, so that it does not unlearn them (PPO-ptx, arXiv 2203.02155, Eq 2)."""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from stages.lib.compute.batching import rows_of_step
from stages.lib.compute.engine.base import Engine
from stages.lib.data.mapped_table import MappedTable
from stages.lib.data.token_tables import SFT_SCHEMA, read_table
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.objectives.sft import SftObjective
from stages.lib.settings.ptx import PtxSettings


class Ptx(NamedTuple):
    """The loss γ CE of rows of `SFT_SCHEMA`, CE a mean over the completion tokens of an optimizer step."""

    table: MappedTable
    objective: SftObjective
    settings: PtxSettings
    seed: int

    def backward(self, engine: Engine) -> dict[str, torch.Tensor]:
        """Add the gradient to that of the optimizer step under way; which rows those are depends on its number alone.

        Returns:
            "ptx/loss": this process's part of CE.
        """
        size, rows = self.settings.batch_size, len(self.table)
        passes = math.ceil((engine.steps_taken + 1) * size / rows)
        chosen = self.table[rows_of_step(engine.steps_taken, rows, size, passes, self.seed)]
        tokens = self.objective.denominators(chosen)["tokens"]
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.objective.batches(chosen):
            loss = self.objective.sums(engine, batch, chosen).loss / tokens
            engine.backward(self.settings.coef * loss)
            total += loss.detach().double().cpu()
        return {"ptx/loss": total}


def read_supervised(path: Path, model: Path) -> MappedTable:
    """The token table of the rows. Raises StageError if it is of another tokenizer than the policy."""
    require_tokens_of(path, model)
    return read_table(path, SFT_SCHEMA)
