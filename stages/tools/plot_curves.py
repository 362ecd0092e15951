"""The training curves of several revisions, one over the other, as one HTML page: what `make plots REV=…` opens.

    python -m stages.tools.plot_curves --rev HEAD --rev workspace --out plots/curves.html

`dvc plots diff` draws the same files, but its page fetches its drawing library from the network and stays empty without
it. A revision is whatever DVC takes for one: a commit, a branch, a tag, the name of an experiment, or `workspace` for
the files as they lie here.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from stages.lib.command.errors import StageError
from stages.lib.command.run import run
from stages.lib.report.curve_tables import CurveTable, curve_in, read_curve
from stages.lib.report.figures import STYLES, Line, left_out_note, line_figure, line_sample
from stages.lib.report.pages import joined_names, render_page, write_page

CURVES = "metrics/curves"
WORKSPACE = "workspace"


class Revision(NamedTuple):
    """A revision by the name it was asked for, and its curves: stage to table."""

    name: str
    curves: dict[str, CurveTable]


def read_revision(name: str) -> Revision:
    """All curves of a revision.

    Raises:
        StageError: DVC does not know the revision, or a file of it is not a curve.
    """
    if name == WORKSPACE:
        return Revision("the workspace", {path.stem: curve_in(path) for path in sorted(Path(CURVES).glob("*.csv"))})
    commit = commit_of(name)
    listing = git("ls-tree", "--name-only", "-z", commit, "--", f"{CURVES}/") or b""
    paths = [path for path in listing.decode("utf-8", "surrogateescape").split("\0") if path.endswith(".csv")]
    contents = {path: git("show", f"{commit}:./{path}") or b"" for path in paths}
    curves = {Path(path).stem: read_curve(content, f"{name}:{path}") for path, content in contents.items()}
    return Revision(f"{name} ({commit[:8]})", curves)


def commit_of(name: str) -> str:
    """The hash of the commit that DVC takes a revision for: also of an experiment, whose refs Git alone does not find.

    Raises:
        StageError: there is no such commit, or several experiments have the name.
    """
    from dvc.scm import SCM, RevError, SCMError, map_scm_exception, resolve_rev

    listed = "`git log --oneline`, `git branch -a` and `dvc exp list --all` list what there is"
    try:
        if not name:
            raise RevError("it is empty")
        with map_scm_exception():
            revision = resolve_rev(SCM(".", search_parent_directories=True), name)
    except SCMError as error:
        raise StageError(f"unknown revision {name!r} ({error}); {listed}") from None
    commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit is None:
        raise StageError(f"unknown revision {name!r} (not a commit); {listed}")
    return commit.decode().strip()


def git(*arguments: str) -> bytes | None:
    """What a git command prints, or None if it fails."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        raise StageError("git is not installed, and the curves of a revision are read through it") from None
    return done.stdout if done.returncode == 0 else None


def stage_figures(stage: str, id_prefix: str, revisions: list[Revision]) -> dict[str, Any]:
    """One figure per metric of a stage, with a line for each revision that has it."""
    curves = {index: revision.curves[stage] for index, revision in enumerate(revisions) if stage in revision.curves}
    metrics = dict.fromkeys(name for curve in curves.values() for name in curve.metrics)
    panels = [
        {
            "title": metric,
            "svg": line_figure(lines, title=f"{stage} {metric}", id_prefix=f"{id_prefix}-{number}"),
            "note": note_of_panel(lines, len(curves)),
        }
        for number, metric in enumerate(metrics)
        if (lines := lines_of_metric(metric, curves, revisions))
    ]
    return {"name": stage, "note": note_of_stage(curves, revisions), "panels": panels}


def note_of_stage(curves: Mapping[int, CurveTable], revisions: list[Revision]) -> str:
    """Where the curves of a stage are missing, and that those there are equal."""
    missing = [revision.name for index, revision in enumerate(revisions) if index not in curves]
    absent = f"Not in {', '.join(missing)}." if missing else ""
    first, *others = curves.values()
    if not others or any(other != first for other in others):
        return absent
    number = "both" if len(curves) == 2 else "all"
    return f"{absent} The same in {number}{' others' if missing else ''}.".strip()


def lines_of_metric(metric: str, curves: Mapping[int, CurveTable], revisions: list[Revision]) -> list[Line]:
    lines = [Line(revisions[index].name, *curve.points(metric), style=index) for index, curve in curves.items()]
    return [line for line in lines if line.values]


def note_of_panel(lines: list[Line], curves: int) -> str:
    """Which revisions alone measured a metric, and what of it is not drawn."""
    only = f"only in {', '.join(line.label for line in lines)}" if len(lines) < curves else ""
    return "; ".join(filter(None, (only, left_out_note(lines))))


def main(
    rev: Annotated[
        list[str] | None, typer.Option(help="A revision; give at least two. Default: HEAD and workspace.")
    ] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("plots/curves.html"),
) -> None:
    """Draw the training curves of revisions into OUT."""
    names = list(dict.fromkeys(rev or ["HEAD", WORKSPACE]))
    if not 2 <= len(names) <= len(STYLES):
        found = f"{len(names)}: {' '.join(names)}"
        raise StageError(f"expected 2 to {len(STYLES)} different revisions, found {found}; give --rev for each")
    revisions = [read_revision(name) for name in names]
    stages = sorted({stage for revision in revisions for stage in revision.curves})
    if not stages:
        raise StageError(f"none of {', '.join(names)} has a curve in {CURVES}; train something first")
    page = render_page(
        "curves.html.jinja",
        {
            "title": f"Training curves of {joined_names(revision.name for revision in revisions)}",
            "revisions": [
                {"name": revision.name, "line": line_sample(style)} for style, revision in enumerate(revisions)
            ],
            "stages": [stage_figures(stage, f"stage-{place}", revisions) for place, stage in enumerate(stages)],
        },
    )
    write_page(out, page)
    print(f"Wrote {out}; open it in a browser.")


if __name__ == "__main__":
    run(main)
