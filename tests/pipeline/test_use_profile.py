"""Profiles: laid over the default settings, never over what params.yaml happens to hold."""

import subprocess
import sys

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from stages.tools.use_profile import overlaid
from tests.pipeline.graph import ROOT

DEFAULT = """\
# Settings of the default run.
seed: 17                       # of everything random

# Where the data comes from.
data:
  path: data/raw/none          # a file or folder
  columns: {}                  # own column -> ours
  # In this order.
  kinds:
  - sft
  - prompts
  max_rows:  # all of them
train:
  # Of AdamW.
  optimizer:
    learning_rate: 3.0e-4      # at its peak
    betas:
    - 0.9
    - 0.95
  epochs: 2   # passes over the data

# The end.
"""
SMALL = """\
# A comment of the profile's own.
data:
  path: data/raw/mine
  columns: {question: prompt, answer: chosen}
  kinds:
    - prompts
train:
  optimizer:
    learning_rate: 1e-5
"""
WITH_SMALL = """\
# Settings of the default run.
seed: 17                       # of everything random

# Where the data comes from.
data:
  path: data/raw/mine          # a file or folder
  columns: {question: prompt, answer: chosen} # own column -> ours
  # In this order.
  kinds:
  - prompts
  max_rows:  # all of them
train:
  # Of AdamW.
  optimizer:
    learning_rate: 1e-5        # at its peak
    betas:
    - 0.9
    - 0.95
  epochs: 2   # passes over the data

# The end.
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/default.yaml").write_text(DEFAULT)
    (tmp_path / "profiles/small.yaml").write_text(SMALL)
    (tmp_path / "params.yaml").write_text(DEFAULT)
    return tmp_path


def use(project, name, *options):
    return subprocess.run(
        [sys.executable, "-m", "stages.tools.use_profile", "--profile", f"profiles/{name}.yaml", *options],
        cwd=project,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_profile_changes_its_keys_and_keeps_comments_and_order(project):
    done = use(project, "small")
    assert done.returncode == 0, done.stderr
    assert (project / "params.yaml").read_text() == WITH_SMALL
    assert done.stdout.splitlines() == [
        "params.yaml holds profile small: 4 settings differ from the default",
        "  data.path: data/raw/none -> data/raw/mine",
        "  data.columns: {} -> {'question': 'prompt', 'answer': 'chosen'}",
        "  data.kinds: ['sft', 'prompts'] -> ['prompts']",
        "  train.optimizer.learning_rate: 0.0003 -> 1e-05",
    ]


def test_going_back_gives_the_bytes_of_the_default(project):
    use(project, "small")
    assert (project / "params.yaml").read_text() != DEFAULT
    assert use(project, "default").returncode == 0
    assert (project / "params.yaml").read_text() == DEFAULT


def test_a_profile_does_not_stand_on_the_one_before(project):
    (project / "profiles/long.yaml").write_text("train: {epochs: 9}\n")
    use(project, "small")
    assert use(project, "long").returncode == 0
    assert YAML(typ="safe").load(project / "params.yaml") == {
        **YAML(typ="safe").load(DEFAULT),
        "train": {"optimizer": {"learning_rate": 3e-4, "betas": [0.9, 0.95]}, "epochs": 9},
    }


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("trian: {epochs: 3}", "trian is not a known key; did you mean 'train'?"),
        ("train: {epoch: 3}", "train.epoch is not a known key; did you mean 'epochs'?"),
        (
            "train: {optimizer: {learning_rat: 1}}",
            "train.optimizer.learning_rat is not a known key; did you mean 'learning_rate'?",
        ),
        ("train: 3", "train is a section: expected keys, found 3 (int)"),
        ("train:", "train is a section: expected keys, found nothing"),
        ("seed: {a: 1}", "seed is one value, such as 17: expected no keys below it"),
        ("- seed", "expected sections (key: value), found list"),
        ("seed: [", ", line 1: not valid YAML"),
    ],
)
def test_a_wrong_profile_is_refused_and_changes_nothing(project, profile, message):
    (project / "profiles/wrong.yaml").write_text(profile)
    done = use(project, "wrong")
    assert done.returncode == 2
    assert done.stderr.startswith("error: profiles/wrong.yaml")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (project / "params.yaml").read_text() == DEFAULT


def test_an_unknown_profile_is_refused_with_the_nearest(project):
    done = use(project, "smal")
    assert done.returncode == 2
    assert done.stderr == (
        "error: profiles/smal.yaml is missing; did you mean 'small'?; the profiles are: default, small\n"
    )


def test_edits_that_no_profile_has_are_kept_unless_dropped(project):
    edited = WITH_SMALL.replace("epochs: 2", "epochs: 5").replace("seed: 17", "seed: 18")
    (project / "params.yaml").write_text(edited)
    done = use(project, "default")
    assert done.returncode == 2
    assert "against profile small it differs in: seed, train.epochs." in done.stderr
    assert (project / "params.yaml").read_text() == edited
    assert use(project, "default", "--drop-edits").returncode == 0
    assert (project / "params.yaml").read_text() == DEFAULT


def test_a_missing_params_file_is_made(project):
    (project / "params.yaml").unlink()
    assert use(project, "small").returncode == 0
    assert (project / "params.yaml").read_text() == WITH_SMALL


# The project's own profiles.

PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))


def test_params_in_git_are_those_of_the_default_run():
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "profiles/default.yaml").read_bytes()


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_an_experiment_changes_one_line_of_params(profile, tmp_path):
    """`dvc exp run -S train_dpo.beta=0.1` writes params.yaml with `apply_overrides`."""
    params = tmp_path / "params.yaml"
    params.write_text(overlaid(ROOT / "profiles/default.yaml", profile))
    before = params.read_text().splitlines()
    apply_overrides(params, ["train_dpo.beta=0.1"])
    after = params.read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.split()[:2] for _, new in changed] == [["beta:", "0.1"]]


def test_the_profiles_of_the_documentation_are_there():
    assert {"default", "hh-local", "qwen2.5-0.5b-hh"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_a_profile_fits_the_default_and_keeps_its_layout(profile, tmp_path):
    """The keys are known, and with no values of its own a profile would give the default's bytes."""
    default = ROOT / "profiles/default.yaml"
    lines, own = default.read_text().splitlines(), overlaid(default, profile).splitlines()
    assert [line for line in own if line.lstrip().startswith("#")] == [
        line for line in lines if line.lstrip().startswith("#")
    ]
    (tmp_path / "empty.yaml").write_text("{}\n")
    assert overlaid(default, tmp_path / "empty.yaml") == default.read_text()
