"""The test rows of an evaluation: texts, prompts and pairs, of the kinds that there are."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.data.mapped_table import MappedTable
from stages.lib.data.prompts import Prompt, prompts_of
from stages.lib.data.token_tables import (
    PREFERENCE_SCHEMA,
    PROMPT_SCHEMA,
    SFT_SCHEMA,
    check_table_fits,
    read_table,
)
from stages.lib.models.model_facts import read_model_facts
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.rl.sampling import require_room

SCHEMAS = {"sft": SFT_SCHEMA, "preference": PREFERENCE_SCHEMA, "prompts": PROMPT_SCHEMA}


class EvaluationRows:
    """The tables of a folder, and the prompts to answer: those of kind prompts or, without them, those of the texts.

    Args:
        folder: of the test split's tables.
        kinds: those that there are.
        model: a folder with the tokenizer of the tables.
    Raises:
        StageError: a table is missing, damaged or of another tokenizer.
    """

    def __init__(self, folder: Path, kinds: Collection[str], max_prompts: int | None, model: Path) -> None:
        self.paths = {kind: folder / f"{kind}.arrow" for kind in SCHEMAS if kind in kinds}
        if not self.paths:
            raise StageError(f"{folder}: there are no test rows of kind {', '.join(SCHEMAS)}, so nothing to evaluate")
        for path in self.paths.values():
            require_tokens_of(path, model)
        self.tables = {kind: read_table(path, SCHEMAS[kind]) for kind, path in self.paths.items()}
        self.asked = next((kind for kind in ("prompts", "sft") if kind in self.tables), None)
        self.prompts: list[Prompt] = []
        if self.asked == "prompts":
            self.prompts = prompts_of(self.tables["prompts"][:max_prompts])
        elif self.asked == "sft":
            self.prompts = prompts_of_texts(self.tables["sft"], max_prompts)

    @property
    def where(self) -> str:
        """The table that the prompts are from; without prompts the first one."""
        return str(self.paths[self.asked or next(iter(self.paths))])

    def sources(self, kind: str) -> list[str]:
        """Of each row."""
        return self.tables[kind]["source"][:]

    def require_fit(self, config: Any, max_new_tokens: int) -> None:
        """Raise StageError if the model has no such token, or no room for a prompt with its response."""
        facts = read_model_facts(config.to_dict())
        for kind, table in self.tables.items():
            check_table_fits(table, facts, self.paths[kind])
        if self.prompts:
            where = f"{self.where} with evaluate.max_new_tokens"
            require_room([prompt.ids for prompt in self.prompts], config, max_new_tokens, where)


def prompts_of_texts(table: MappedTable, max_prompts: int | None) -> list[Prompt]:
    """What comes before the first trained token of each row; rows that are trained from the start have none."""
    prompts: list[Prompt] = []
    for place in range(len(table)):
        row = table[place]
        start = row["loss_mask"].index(True)
        if start > 1:
            asked = {name: [row[name]] for name in ("row", "messages", "context", "source")}
            prompts += prompts_of({**asked, "prompt_ids": [row["input_ids"][:start]], "facts": ["{}"]})
        if len(prompts) == max_prompts:
            break
    return prompts
