import os
import re
import subprocess
import sys

import pytest

from stages.lib.report.figures import COLOURS, STYLES
from tests.loaded_python import loaded_python
from tests.real_files import PROJECT

SFT = "step,loss,eval/loss\n1,0.9,\n2,0.5,0.6\n"
LOWER = "step,loss,eval/loss,grad_norm\n1,0.8,,3.0\n2,0.25,0.3,2.0\n"


def git(folder, *arguments):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True)


def plot(folder, *revisions):
    arguments = [argument for revision in revisions for argument in ("--rev", revision)]
    return subprocess.run(
        [*loaded_python(), "-m", "stages.tools.plot_curves", *arguments, "--out", "plots/curves.html"],
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
    assert all(colour.lower() in svg for colour in COLOURS[:2])
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


@pytest.mark.parametrize("revision", ["nowhere", "--all", "first:project", "main:project/metrics", "", "@{-1}", "a b"])
def test_an_unknown_revision_is_one_message(project, revision):
    process = plot(project, revision, "workspace")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: unknown revision {revision!r} (")
    assert "dvc exp list" in line
    assert not (project / "plots").exists()


def test_outside_of_git_and_before_the_first_commit_it_is_one_message(tmp_path):
    write_curve(tmp_path, "train_sft", SFT)
    for _ in range(2):
        process = plot(tmp_path, "HEAD", "workspace")
        assert process.returncode == 2
        (line,) = process.stderr.splitlines()
        assert line.startswith("error: unknown revision 'HEAD' (")
        git(tmp_path, "init", "-q")


def test_several_revisions_have_a_line_each_in_the_figures_and_in_the_legend(project):
    git(project, "tag", "again")
    write_curve(project, "train_sft", LOWER.replace("0.25", "0.125"))
    page, labels = drawn(project, "first", "main", "again", "workspace", "main")
    legend = re.search(r'<p class="legend">(.*?)</p>', page, re.DOTALL)[1]
    assert re.findall(r'stroke="(#\w+)"', legend) == list(COLOURS)
    assert len(set(re.findall(r'stroke-dasharray="[^"]*"', legend))) == 3
    names = re.findall(r"</svg> ([^<]*)</span>", legend)
    assert [name.split()[0] for name in names] == ["first", "main", "again", "the"]
    assert re.search(r"<title>Training curves of first \S+, main \S+, again \S+ and the workspace</title>", page)
    loss = next(label for label in labels if label.startswith("train_sft loss"))
    assert re.search(r"first .* to 0\.5 .*main .* to 0\.25 .*again .* to 0\.25 .*the workspace .* to 0\.125", loss)
    svg = next(svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if "train_sft loss" in svg)
    assert all(f"stroke: {colour.lower()}" in svg for colour in COLOURS)
    assert re.search(r"<code>grad_norm</code> <small>only in main \S+, again \S+, the workspace</small>", page)
    assert re.search(
        r"<code>train_rm</code></h2>\s*<p class=\"note\">Not in first \S+\. The same in all others\.", page
    )


def test_what_is_the_same_in_all_or_both_others_is_said_so(project):
    git(project, "tag", "again")
    page, _ = drawn(project, "again", "main", "workspace")
    assert page.count("The same in all.") == 2
    page, _ = drawn(project, "first", "again", "main")
    assert page.count("The same in both others.") == 1
    assert page.count("The same in") == 1


DVC = [sys.executable, "-m", "dvc"]
GRAPH = """
stages:
  train_sft:
    cmd: cp ${train_sft.curve}.csv metrics/curves/train_sft.csv && cp ${train_sft.curve}.json metrics/train_sft.json
    outs:
      - metrics/curves/train_sft.csv: {cache: false}
    metrics:
      - metrics/train_sft.json: {cache: false}
"""


@pytest.mark.slow
def test_experiments_are_drawn_by_name_as_dvc_compares_their_metrics(tmp_path):
    def dvc(*words):
        done = subprocess.run([*DVC, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "config", "user.name", "a")
    git(tmp_path, "config", "user.email", "a@b")
    dvc("init", "-q")
    for name, last in {"first": 0.5, "second": 0.25, "third": 0.125}.items():
        (tmp_path / f"{name}.csv").write_text(SFT.replace("0.5", str(last)))
        (tmp_path / f"{name}.json").write_text(f'{{"loss": {last}}}')
    (tmp_path / "dvc.yaml").write_text(GRAPH)
    (tmp_path / "params.yaml").write_text("train_sft: {curve: first}\n")
    (tmp_path / "metrics/curves").mkdir(parents=True)
    dvc("repro", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    for name, curve in {"exp-a": "second", "exp-b": "third"}.items():
        dvc("exp", "run", "-q", "-n", name, "-S", f"train_sft.curve={curve}")
    git(tmp_path, "checkout", "-q", "--", ".")

    _, labels = drawn(tmp_path, "main", "exp-a", "exp-b", "workspace")
    short = r"\([0-9a-f]{8}\)"
    ends = [
        rf"{name} from 0\.9 at step 1 to {last} at step 2"
        for name, last in {
            f"main {short}": r"0\.5",
            f"exp-a {short}": r"0\.25",
            f"exp-b {short}": r"0\.125",
            "the workspace": r"0\.5",
        }.items()
    ]
    assert re.fullmatch("train_sft loss: " + "; ".join(ends), labels[0])
    compared = dvc("metrics", "diff", "exp-a").splitlines()[-1].split()
    assert compared == ["metrics/train_sft.json", "loss", "0.25", "0.5", "0.25"]


def test_a_broken_curve_is_named_with_its_revision(project):
    write_curve(project, "train_sft", "step,loss\n1,low\n")
    assert (
        "error: metrics/curves/train_sft.csv, line 2: column 'loss' holds 'low'"
        in plot(project, "main", "workspace").stderr
    )
    git(project, "commit", "-qam", "broken")
    assert "error: main:metrics/curves/train_sft.csv, line 2: column" in plot(project, "main", "workspace").stderr


@pytest.mark.parametrize("content", [b"step,loss\n", b"\xff\n"])
def test_a_curve_that_is_not_one_is_a_line_here_and_in_a_commit(project, content):
    path = project / "metrics/curves/train_sft.csv"
    path.write_bytes(content)
    git(project, "add", ".")
    git(project, "commit", "-qm", "broken")
    for revision, where in {"workspace": "", "main": "main:"}.items():
        process = plot(project, "first", revision)
        assert process.returncode == 2
        (line,) = process.stderr.splitlines()
        assert line.startswith(f"error: {where}metrics/curves/train_sft.csv")


def test_files_and_columns_of_any_name_are_drawn_and_ids_stay_unique(project):
    hostile = 'step,url(#x,"href=""#a","line\nbreak",</script>\n1,1,2,3,4\n2,2,3,4,5\n'
    for name in ('a"b', "a b", "<b>", "url(#y", "stage-0", "\udc80"):
        write_curve(project, name, hostile)
    git(project, "add", ".")
    git(project, "commit", "-qm", "hostile")
    page, labels = drawn(project, "main", "workspace")
    assert len(labels) == 6 * 4 + 3 + 2
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"stage-\d+-\d+-\d+", found) for found in ids)
    drawing = re.sub(r'aria-label="[^"]*"', "", page)
    assert set(re.findall(r'(?:href="#|: url\(#|"url\(#)([\w-]+)', drawing)) == set(ids)
    assert "<b>" not in page
    assert "<script" not in page


def test_what_is_not_a_file_is_named(project):
    (project / "metrics/curves/folder.csv").mkdir()
    process = plot(project, "first", "workspace")
    assert process.returncode == 2
    assert "error: metrics/curves/folder.csv is not a file" in process.stderr


def test_a_folder_in_the_place_of_the_page_stays(project):
    (project / "plots/curves.html").mkdir(parents=True)
    process = plot(project, "first", "main")
    assert process.returncode == 2
    assert process.stderr.startswith("error: plots/curves.html is a folder")
    assert (project / "plots/curves.html").is_dir()


def test_no_curves_and_too_few_or_too_many_revisions_are_errors(project, tmp_path):
    for revisions, found in [(["first"], "1: first"), (["main", "main"], "1: main")]:
        process = plot(project, *revisions)
        message = f"error: expected 2 to {len(STYLES)} different revisions, found {found}; give --rev for each\n"
        assert (process.returncode, process.stderr) == (2, message)
    process = plot(project, *map(str, range(9)))
    assert process.returncode == 2
    assert "different revisions, found 9: 0 1 2 3 4 5 6 7 8;" in process.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    process = plot(empty, "workspace", "main")
    assert process.returncode == 2
    assert "none of workspace, main has a curve in metrics/curves" in process.stderr
