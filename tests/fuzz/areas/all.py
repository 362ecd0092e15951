"""The areas by name."""

from tests.fuzz.areas import (
    checkpoints,
    comparisons,
    files,
    given_rewards,
    models,
    params,
    reference,
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
    "sources": sources.AREA,
    "params": params.AREA,
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
