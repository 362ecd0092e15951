"""The prompts that an RL stage trains on: their table, whether it fits the model, and which of them a phase has."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stages.lib.compute.batching import epoch_order, rows_of_step
from stages.lib.data.mapped_table import MappedTable
from stages.lib.data.prompts import Prompt, prompts_of
from stages.lib.data.token_tables import PROMPT_SCHEMA, check_table_fits, read_table
from stages.lib.models.pretrained import facts_of
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.rl.sampling import require_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Phases(Protocol):
    """What `prompts_of_phase` reads of a section of params.yaml."""

    @property
    def iterations(self) -> int: ...

    @property
    def rollout_batch_size(self) -> int: ...


def read_prompts(path: Path, *models: Path) -> MappedTable:
    """The prompts' token table. Raises StageError if it is of another tokenizer than policy and reference."""
    for model in models:
        require_tokens_of(path, model)
    return read_table(path, PROMPT_SCHEMA)


def require_fit(table: MappedTable, path: Path, model: "PreTrainedModel", max_new_tokens: int, stage: str) -> None:
    """Raise StageError if the model has no such token, or no room for a prompt with its response."""
    check_table_fits(table, facts_of(model), path)
    require_room(table["prompt_ids"], model.config, max_new_tokens, f"{path} with {stage}.max_new_tokens")


def prompts_of_phase(table: MappedTable, phase: int, settings: Phases, seed: int) -> list[Prompt]:
    """The prompts of a phase (0-based); as many passes are made over the table as all phases take."""
    passes = math.ceil(settings.iterations * settings.rollout_batch_size / len(table))
    return prompts_of(table[rows_of_step(phase, len(table), settings.rollout_batch_size, passes, seed)])


def prompts_from(table: MappedTable, first: int, count: int, seed: int) -> list[Prompt]:
    """Some prompts from the `first` (0-based) on, of passes over the table in the order of `prompts_of_phase`."""
    rows = len(table)
    places = range(first, first + count)
    return prompts_of(table[[int(epoch_order(rows, seed, place // rows)[place % rows]) for place in places]])
