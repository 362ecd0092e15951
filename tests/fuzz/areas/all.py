"""The areas by name."""

from tests.fuzz.areas import (
    blocks,
    checkpoints,
    comparisons,
    files,
    given_rewards,
    mixtures,
    models,
    params,
    reference,
    reply_trees,
    report,
    rows,
    runtime,
    sources,
    tables,
    templates,
    tokens,
)
from tests.fuzz.case import Area

AREAS: dict[str, Area] = {
    "rows": rows.AREA,
    "comparisons": comparisons.AREA,
    "reply_trees": reply_trees.AREA,
    "sources": sources.AREA,
    "mixtures": mixtures.AREA,
    "params": params.AREA,
    "blocks": blocks.AREA,
    "runtime": runtime.AREA,
    "templates": templates.AREA,
    "tokens": tokens.AREA,
    "tables": tables.AREA,
    "reference": reference.AREA,
    "models": models.AREA,
    "given_rewards": given_rewards.AREA,
    "checkpoints": checkpoints.AREA,
    "report": report.AREA,
    "files": files.AREA,
}
