"""What the sections on data must say together: which sources there are, and what they serve."""

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.settings.prepare_data import PrepareData
from stages.lib.settings.sources import Sources, TaskSettings


def require_served(data: PrepareData, sources: Sources) -> None:
    """Raise StageError where a kind of rows is served by no source, or a source by its name is not what is needed."""
    for kind in data.kinds:
        if not any(kind in source.kinds for source in sources.by_name.values()):
            raise StageError(
                f"params.yaml: prepare_data.kinds: no source serves {kind}; add it to the kinds of one, or leave it out"
            )
    if data.decontamination is None:
        return
    for name in data.decontamination.sources:
        if name not in sources.by_name:
            raise StageError(
                f"params.yaml: prepare_data.decontamination.sources: no source is named {name}"
                f"{nearest(name, sources.by_name)}"
            )
        source = sources.by_name[name]
        if not isinstance(source, TaskSettings) and source.split != "test":
            raise StageError(
                f"params.yaml: prepare_data.decontamination.sources: {sources.place_of(name)}.split is not test"
            )


def may_have_scores(sources: Sources) -> bool:
    """Whether a source of unpaired rows makes their labels of scores, which then stand beside them."""
    of_replies = [source for source in sources.by_name.values() if "unpaired" in source.kinds]
    return any(getattr(source, "threshold", None) is not None for source in of_replies)


def may_have_margins(sources: Sources) -> bool:
    """False if every pair is made by a task, none of which gives margins."""
    of_pairs = [source for source in sources.by_name.values() if "preference" in source.kinds]
    return any(not isinstance(source, TaskSettings) for source in of_pairs)
