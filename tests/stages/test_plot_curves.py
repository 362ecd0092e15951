import os
import re
import subprocess
import sys

import pytest

from stages.lib.figures import COLOURS
from tests.real_files import PROJECT

SFT = "step,loss,eval/loss\n1,0.9,\n2,0.5,0.6\n"
LOWER = "step,loss,eval/loss,grad_norm\n1,0.8,,3.0\n2,0.25,0.3,2.0\n"


def git(folder, *arguments):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True)


def plot(folder, *revisions):
    arguments = [argument for revision in revisions for argument in ("--rev", revision)]
    return subprocess.run(
        [sys.executable, "-m", "stages.plot_curves", *arguments, "--out", "plots/curves.html"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )


def drawn(folder, *revisions):
    """The page and what its figures say they show."""
    process = plot(folder, *revisions)
    assert process.returncode == 0, process.stderr
    page = (folder / "plots/curves.html").read_text(encoding="utf-8")
    return page, re.findall(r'aria-label="([^"]*)"', page)


def write_curve(folder, stage, text):
    curves = folder / "metrics/curves"
    curves.mkdir(parents=True, exist_ok=True)
    (curves / f"{stage}.csv").write_text(text, encoding="utf-8")


@pytest.fixture
def project(tmp_path):
    """A project inside a larger git repository: `first` has train_sft, `main` a lower one and train_rm."""
    git(tmp_path, "init", "-q", "-b", "main")
    folder = tmp_path / "project"
    write_curve(folder, "train_sft", SFT)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "tag", "first")
    write_curve(folder, "train_sft", LOWER)
    write_curve(folder, "train_rm", SFT)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "second")
    return folder


def test_two_revisions_lie_over_each_other(project):
    page, labels = drawn(project, "first", "main")
    short = re.search(r"first \(([0-9a-f]{8})\)", page)[1]
    loss = next(label for label in labels if label.startswith("train_sft loss"))
    assert re.fullmatch(
        rf"train_sft loss: first \({short}\) from 0\.9 at step 1 to 0\.5 at step 2; "
        r"main \([0-9a-f]{8}\) from 0\.8 at step 1 to 0\.25 at step 2",
        loss,
    )
    svg = next(svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if "train_sft loss" in svg)
    assert all(colour.lower() in svg for colour in COLOURS)
    assert any(re.match(r"train_sft eval/loss: first .* from 0\.6 .*; main .* from 0\.3 ", label) for label in labels)
    assert "//" not in page
    assert "<script" not in page


def test_what_only_one_revision_has_is_shown_alone_and_said(project):
    page, labels = drawn(project, "first", "main")
    assert re.search(r"<code>train_rm</code></h2>\s*<p class=\"note\">Not in first \(", page)
    assert re.search(r"<code>grad_norm</code> <small>only in main \(", page)
    assert any(re.match(r"train_rm loss: main \S+ from 0\.9 at step 1 to 0\.5 at step 2$", label) for label in labels)


def test_the_default_is_the_last_commit_against_what_lies_here(project):
    write_curve(project, "train_sft", LOWER.replace("0.25", "0.125"))
    page, labels = drawn(project)
    assert "Training curves of HEAD (" in page
    loss = next(label for label in labels if label.startswith("train_sft loss"))
    assert re.search(r"HEAD \S+ from 0\.8 at step 1 to 0\.25 .*; the workspace from 0\.8 at step 1 to 0\.125 ", loss)
    assert re.search(r"<code>train_rm</code></h2>\s*<p class=\"note\">The same in both\.", page)
    assert page.count("The same in both.") == 1


def test_the_name_of_a_revision_is_text(project):
    git(project, "branch", "<b>&")
    page, _ = drawn(project, "<b>&", "workspace")
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page


@pytest.mark.parametrize("revision", ["nowhere", "--all", "first:project"])
def test_an_unknown_revision_is_one_message(project, revision):
    process = plot(project, revision, "workspace")
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: git knows no revision '{revision}'")
    assert not (project / "plots").exists()


def test_a_broken_curve_is_named_with_its_revision(project):
    write_curve(project, "train_sft", "step,loss\n1,low\n")
    assert "error: metrics/curves/train_sft.csv: column 'loss' holds 'low'" in plot(project, "main", "workspace").stderr
    git(project, "commit", "-qam", "broken")
    assert "error: main:metrics/curves/train_sft.csv: column" in plot(project, "main", "workspace").stderr


def test_no_curves_and_one_revision_are_errors(project, tmp_path):
    process = plot(project, "first")
    assert (process.returncode, process.stderr) == (
        2,
        "error: expected two revisions, found 1: first; give --rev twice\n",
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    process = plot(empty, "workspace", "main")
    assert process.returncode == 2
    assert "neither workspace nor main has a curve in metrics/curves" in process.stderr
