"""The training curves of two revisions, one over the other, as one HTML page: what `make plots REV=…` opens.

    python -m stages.plot_curves --rev HEAD --rev workspace --out plots/curves.html

`dvc plots diff` draws the same files, but its page fetches its drawing library from the network and stays empty without
it. A revision is whatever git takes for one, or `workspace` for the files as they lie here.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from stages.lib.curve_tables import read_curve
from stages.lib.errors import StageError, run
from stages.lib.figures import COLOURS, Line, line_figure
from stages.lib.outputs import written_whole
from stages.lib.pages import render_page, write_page

CURVES = "metrics/curves"
WORKSPACE = "workspace"


class Revision(NamedTuple):
    """A revision by the name it was asked for, and its curves: stage to table."""

    name: str
    curves: dict[str, Any]


def read_revision(name: str) -> Revision:
    """All curves of a revision.

    Raises:
        StageError: git does not know the revision, or a file of it is no curve.
    """
    if name == WORKSPACE:
        files = {
            path.name: path.read_text(encoding="utf-8", errors="replace") for path in sorted(Path(CURVES).glob("*.csv"))
        }
        return Revision("the workspace", tables(files, ""))
    commit = git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if commit is None:
        raise StageError(f"git knows no revision '{name}'; `git log --oneline` lists commits, `git branch -a` branches")
    listing = git("ls-tree", "--name-only", "-z", commit.strip(), "--", f"{CURVES}/") or ""
    paths = [path for path in listing.split("\0") if path.endswith(".csv")]
    files = {Path(path).name: git("show", f"{commit.strip()}:./{path}") or "" for path in paths}
    return Revision(f"{name} ({commit[:8]})", tables(files, f"{name}:"))


def tables(files: Mapping[str, str], origin: str) -> dict[str, Any]:
    return {Path(name).stem: read_curve(text, f"{origin}{CURVES}/{name}") for name, text in files.items()}


def git(*arguments: str) -> str | None:
    """What a git command prints, or None if it fails."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        raise StageError("git is not installed, and the curves of a revision are read through it") from None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def stage_figures(stage: str, revisions: list[Revision]) -> dict[str, Any]:
    """One figure a metric of a stage, a line a revision that has it."""
    curves = {index: revision.curves[stage] for index, revision in enumerate(revisions) if stage in revision.curves}
    metrics = dict.fromkeys(name for curve in curves.values() for name in curve.columns)
    panels = [panel(stage, number, metric, curves, revisions) for number, metric in enumerate(metrics)]
    return {"name": stage, "note": note_of(curves, revisions), "panels": [found for found in panels if found]}


def note_of(curves: Mapping[int, Any], revisions: list[Revision]) -> str:
    missing = [revision.name for index, revision in enumerate(revisions) if index not in curves]
    if missing:
        return f"Not in {', '.join(missing)}."
    first, *others = curves.values()
    return "The same in both." if all(first.equals(other) for other in others) else ""


def panel(stage: str, number: int, metric: str, curves: Mapping[int, Any], revisions: list[Revision]) -> Any:
    """The figure of one metric, or None if no revision measured it."""
    measured = {index: curve[metric].dropna() for index, curve in curves.items() if metric in curve}
    lines = [
        Line(revisions[index].name, series.index, series, style=index)
        for index, series in measured.items()
        if len(series)
    ]
    if not lines:
        return None
    alone = len(lines) == 1 and len(curves) > 1
    svg = line_figure(lines, title=f"{stage} {metric}", id_prefix=f"{stage}-{number}")
    return {"title": metric, "svg": svg, "note": f"only in {lines[0].label}" if alone else ""}


def main(
    rev: Annotated[list[str] | None, typer.Option(help="A revision; give two. Default: HEAD and workspace.")] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("plots/curves.html"),
) -> None:
    """Draw the training curves of two revisions into OUT."""
    names = rev or ["HEAD", WORKSPACE]
    if len(names) != 2:
        raise StageError(f"expected two revisions, found {len(names)}: {' '.join(names)}; give --rev twice")
    revisions = [read_revision(name) for name in names]
    stages = sorted({stage for revision in revisions for stage in revision.curves})
    if not stages:
        raise StageError(f"neither {names[0]} nor {names[1]} has a curve in {CURVES}; train something first")
    page = render_page(
        "curves.html.jinja",
        {
            "title": f"Training curves of {revisions[0].name} and {revisions[1].name}",
            "revisions": [
                {"name": revision.name, "colour": colour} for revision, colour in zip(revisions, COLOURS, strict=True)
            ],
            "stages": [stage_figures(stage, revisions) for stage in stages],
        },
    )
    with written_whole(out) as (partial,):
        write_page(partial, page)
    print(f"Wrote {out}; open it in a browser.")


if __name__ == "__main__":
    run(main)
