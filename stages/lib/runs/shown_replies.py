"""What a stage shows of a model that it trains: replies to a few held-out prompts after each evaluation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stages.lib.compute.engine.base import Engine
from stages.lib.models.pretrained import end_and_pad_ids, facts_of
from stages.lib.operations.greedy_replies import GreedyReplies
from stages.lib.runs.training_run import TrainingRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PAIRS_OF_A_PROMPT = 8  # rows that are looked through for each prompt: pairs of one may follow each other


class TokenTable(Protocol):
    """Rows of tokens; a slice gives columns."""

    def __getitem__(self, rows: Any, /) -> Mapping[str, list[Any]]: ...


def shown_replies(
    run: TrainingRun, engine: Engine, language_model: "PreTrainedModel", held_out: TokenTable, model: Path
) -> Callable[[int], None]:
    """Shows, after a step (0-based), what the model answers to the first prompts of the held-out rows.

    Args:
        model: the folder that training started from, for its tokenizer.
    """
    count = run.runtime.shown_samples
    return GreedyReplies(
        engine,
        language_model,
        held_out[: PAIRS_OF_A_PROMPT * count],
        count,
        model / "tokenizer.json",
        end_and_pad_ids(model)[0],
        facts_of(language_model).positions,
        run.processes,
        run.show_replies,
    )
