"""Raw rows read for a test, with the options that it names and all others as they are by default."""

from collections import Counter

from stages.lib.data.formats import examples_of
from stages.lib.settings.declaration import block
from stages.lib.settings.reading import (
    OrderedComparison,
    ReadingOptions,
    ScoredComparison,
    Threshold,
    TreeComparison,
    WinnerComparison,
)

COMPARISONS = {
    "winner": WinnerComparison,
    "scores": ScoredComparison,
    "order": OrderedComparison,
    "tree": TreeComparison,
}


def options(comparison=None, threshold=None, **changed):
    """Options with the defaults of every block that is named, changed as it says."""
    if comparison is not None:
        comparison = block(COMPARISONS[comparison["type"]], **comparison)
    if threshold is not None:
        threshold = block(Threshold, **threshold)
    return ReadingOptions(**block(ReadingOptions, comparison=comparison, threshold=threshold, **changed))


def read(row, name, where="here", counts=None, facts=None, renames=None, **changed):
    """The examples of one row."""
    counts = Counter() if counts is None else counts
    return examples_of(row, name, options(**changed), where, facts=facts, renames=renames, counts=counts)


def one_example(row, name, where="here", **arguments):
    """The only example of one row."""
    (example,) = read(row, name, where, **arguments)
    return example


def said(example):
    """Prompt, and the texts of reply and rejected reply, None for one that is not there."""
    texts = [reply and reply["content"] for reply in (example.reply, example.rejected)]
    return (example.prompt, *texts)
