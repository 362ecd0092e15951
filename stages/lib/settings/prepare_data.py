"""Section `prepare_data` of params.yaml: which kinds of rows are made, what is held out, and what is left out."""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt
from pydantic import model_validator

from stages.lib.data.prepared_rows import Kind
from stages.lib.settings.bounds import Several, Text
from stages.lib.settings.declaration import Settings, key

HeldOutShare = Annotated[float, Ge(0), Lt(1)]
SharedWords = Annotated[int, Ge(1), Le(1000)]
Similarity = Annotated[float, Gt(0), Le(1)]


class NearDuplicates(Settings):
    """Train rows that are nearly those of an earlier one, by MinHash of their runs of words."""

    similarity: Similarity = key(
        0.8,
        "leave out a train row that shares about so much with an earlier one of its kind",
        unit="Jaccard similarity of the sets of runs of words",
        source="A. Z. Broder, On the resemblance and containment of documents",
    )
    words: SharedWords = key(5, "in a run", unit="words")
    permutations: Annotated[int, Ge(16), Le(1024)] = key(
        128, "of MinHash; the similarity's standard error is at most 1 / (2 √permutations)"
    )


class Decontamination(Settings):
    """Train rows in which much of a test prompt stands again."""

    sources: Several[Text] = key([], "sources of split test whose prompts may not stand in train rows")
    words: SharedWords = key(8, "in a run; prompts of fewer are compared as a whole", unit="words")
    overlap: Similarity = key(
        0.5,
        "leave out a train row in which at least so much of a test prompt stands",
        unit="share of the prompt's runs of words",
        source="arXiv 2411.15124, section 3.2",
    )

    @model_validator(mode="after")
    def _check(self) -> "Decontamination":
        if not self.sources:
            raise ValueError("sources must name at least one source of split test")
        return self


class PrepareData(Settings):
    """Rows of all sources become kinds of rows, in splits for training, validation and test."""

    kinds: Several[Kind] = key(["sft", "preference", "prompts"], "kinds to make; one left out has no files")
    validation_fraction: HeldOutShare = key(
        0.05,
        "held out from training, to choose by; of sources without a split of their own",
        unit="share of the distinct prompts",
    )
    test_fraction: HeldOutShare = key(
        0.05,
        "held out for the evaluation alone; of sources without a split of their own",
        unit="share of the distinct prompts",
    )
    near_duplicates: NearDuplicates | None = key(None, "leave out train rows that are nearly another; null: keep them")
    decontamination: Decontamination | None = key(
        None, "leave out train rows that hold test prompts, beyond those with an equal prompt; null: keep them"
    )

    @model_validator(mode="after")
    def _check(self) -> "PrepareData":
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError("kinds must name at least one kind, and each once")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction and test_fraction leave nothing for training: they must be below 1 together"
            )
        return self
