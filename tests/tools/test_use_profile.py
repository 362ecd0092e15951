"""Profiles: laid over the defaults of the settings, never over what params.yaml happens to hold."""

import subprocess
import sys
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from stages.lib.settings.sections import default_params
from stages.tools.use_profile import merged, settings_of, text_with
from tests.real_files import PROJECT

PARAMS = (PROJECT / "params.yaml").read_text(encoding="utf-8")
PROFILES = [PROJECT / "profiles/default.yaml", *sorted((PROJECT / "profiles").glob("*.yaml"))]
SMALL = """\
# A comment of the profile's own.
prepare_data:
  source: local
  path: data/raw/mine
  columns: {question: prompt, answer: chosen}
  kinds:
    - sft
train_dpo:
  loss: {type: ipo, beta: 0.1}
train_sft:
  optimizer:
    learning_rate: 1e-5
"""
CHANGED = {
    "  source: film_reviews  ": "  source: local         ",
    "  path: data/raw/none           # source local: a .j": "  path: data/raw/mine           # source local: a .j",
    "  columns: {}                   #": "  columns: {question: prompt, answer: chosen} #",
    "  - sft\n  - preference\n  - prompts\n": "  - sft\n",
    "  loss: {type: sigmoid, beta: 0.2, label_smoothing: 0.0}": "  loss: {type: ipo, beta: 0.1}",
    "    learning_rate: 1.5e-3       # peak": "    learning_rate: 1.0e-5       # peak",
}


def with_small() -> str:
    text = PARAMS
    for old, new in CHANGED.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/small.yaml").write_text(SMALL)
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path


def use(project: Path, name: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "stages.tools.use_profile", "--profile", f"profiles/{name}.yaml", *options],
        cwd=project,
        env={"PYTHONPATH": str(PROJECT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def values(text: str) -> dict:
    return YAML(typ="safe", pure=True).load(text)


def test_a_profile_changes_its_keys_and_keeps_comments_and_order(project: Path) -> None:
    done = use(project, "small")
    assert done.returncode == 0, done.stderr
    assert (project / "params.yaml").read_text() == with_small()
    assert done.stdout.splitlines() == [
        "params.yaml holds profile small: 6 settings differ from the default",
        "  prepare_data.source: film_reviews -> local",
        "  prepare_data.path: data/raw/none -> data/raw/mine",
        "  prepare_data.columns: {} -> {'question': 'prompt', 'answer': 'chosen'}",
        "  prepare_data.kinds: ['sft', 'preference', 'prompts'] -> ['sft']",
        "  train_sft.optimizer.learning_rate: 0.0015 -> 1e-05",
        "  train_dpo.loss: {'type': 'sigmoid', 'beta': 0.2, 'label_smoothing': 0.0} -> {'type': 'ipo', 'beta': 0.1}",
    ]


@pytest.mark.parametrize("name", ["small", "hh-local", "qwen2.5-0.5b-hh"])
def test_going_back_gives_the_bytes_of_the_default(project: Path, name: str) -> None:
    if name != "small":
        (project / f"profiles/{name}.yaml").write_bytes((PROJECT / f"profiles/{name}.yaml").read_bytes())
    use(project, name)
    assert (project / "params.yaml").read_text() != PARAMS
    assert use(project, "default").returncode == 0
    assert (project / "params.yaml").read_text() == PARAMS


def test_adapters_come_and_go() -> None:
    lora = {
        "rank": 4,
        "alpha": 8,
        "targets": ["q_proj"],
        "rslora": False,
        "base_quantization": None,
        "save_adapter": False,
    }
    text = text_with(PARAMS, merged(default_params(), {"train_sft": {"lora": lora}}))
    assert values(text)["train_sft"]["lora"] == lora
    assert text_with(text, default_params()) == PARAMS


def test_comments_of_ones_own_stay(project: Path) -> None:
    own = PARAMS.replace("  epochs: 1.0  ", "  epochs: 1.5  ", 1).replace("train_rm:\n", "# Mine.\ntrain_rm:\n")
    (project / "params.yaml").write_text(own)
    assert use(project, "default", "--drop-edits").returncode == 0
    assert (project / "params.yaml").read_text() == PARAMS.replace("train_rm:\n", "# Mine.\ntrain_rm:\n")


def test_a_profile_does_not_stand_on_the_one_before(project: Path) -> None:
    (project / "profiles/long.yaml").write_text("train_rm: {epochs: 9.0}\n")
    use(project, "small")
    assert use(project, "long").returncode == 0
    assert values((project / "params.yaml").read_text()) == merged(default_params(), {"train_rm": {"epochs": 9.0}})


@pytest.mark.parametrize(
    ("left_out", "added"),
    [
        ("  missing_eos_penalty: ", ""),
        ("", "train_kto:\n  beta: 0.1\n"),
        ("  save_dtype: float32\n", "extra: {a: 1}\n"),
    ],
)
def test_keys_that_are_too_few_or_too_many_are_put_right(project: Path, left_out: str, added: str) -> None:
    """As after an update that has brought a key, or taken one away."""
    lines = PARAMS.splitlines(keepends=True)
    cut = next((number for number, line in enumerate(lines) if left_out and line.startswith(left_out)), len(lines))
    (project / "params.yaml").write_text("".join(lines[:cut] + lines[cut + 1 :]) + added)
    assert use(project, "default").returncode == 2
    assert use(project, "default", "--drop-edits").returncode == 0
    assert values((project / "params.yaml").read_text()) == default_params()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("trian_rm: {epochs: 3}", ": no stage reads 'trian_rm'; did you mean 'train_rm'?"),
        ("train_rm: {epoch: 3}", ": train_rm.epoch is not a known key; did you mean 'epochs'?"),
        (
            "train_rm: {optimizer: {learning_rat: 1}}",
            ": train_rm.optimizer.learning_rat is not a known key; did you mean 'learning_rate'?",
        ),
        ("train_rm: 3", ": train_rm: expected a section with keys, found 3 (int)"),
        ("train_rm:", ": train_rm: expected a section with keys, found nothing"),
        ("seed: {a: 1}", ": seed: expected a whole number, found {'a': 1} (dict)"),
        ("train_rm: {epochs: -1.0}", ": train_rm.epochs must be above 0, found -1.0"),
        ("train_dpo: {loss: {type: ipo}}", ": train_dpo.loss.beta is missing; its default is 0.2"),
        ("- seed", ": expected sections (key: value), found list"),
        ("seed: [", ", line 1: not valid YAML"),
    ],
)
def test_a_wrong_profile_is_refused_and_changes_nothing(project: Path, profile: str, message: str) -> None:
    (project / "profiles/wrong.yaml").write_text(profile)
    done = use(project, "wrong")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: profiles/wrong.yaml{message}")
    assert len(done.stderr.splitlines()) == 1
    assert (project / "params.yaml").read_text() == PARAMS


def test_an_unknown_profile_is_refused_with_the_nearest(project: Path) -> None:
    done = use(project, "smal")
    assert done.returncode == 2
    assert done.stderr == (
        "error: profiles/smal.yaml is missing; did you mean 'small'?; the profiles are: default, small\n"
    )


def test_a_file_called_default_would_be_a_second_copy(project: Path) -> None:
    (project / "profiles/default.yaml").write_text(PARAMS)
    done = use(project, "default")
    assert done.returncode == 2
    assert done.stderr == (
        "error: profiles/default.yaml: the defaults are those that the settings declare; give it another name\n"
    )


def test_edits_that_no_profile_has_are_kept_unless_dropped(project: Path) -> None:
    edited = with_small().replace("seed: 17", "seed: 18").replace("  iterations: 10  ", "  iterations: 11  ", 1)
    (project / "params.yaml").write_text(edited)
    done = use(project, "default")
    assert done.returncode == 2
    assert "against profile small it differs in: seed, train_ppo.iterations." in done.stderr
    assert (project / "params.yaml").read_text() == edited
    assert use(project, "default", "--drop-edits").returncode == 0
    assert (project / "params.yaml").read_text() == PARAMS


def test_a_missing_params_file_is_told(project: Path) -> None:
    (project / "params.yaml").unlink()
    done = use(project, "small")
    assert done.returncode == 2
    assert done.stderr.startswith("error: params.yaml is missing")


def test_a_block_takes_the_profiles_type_or_single_keys_of_its_own() -> None:
    loss = default_params()["train_dpo"]["loss"]
    assert merged(loss, {"beta": 0.1}) == {"type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}
    assert merged(loss, {"type": "sigmoid", "beta": 0.1}) == {"type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}
    assert merged(loss, {"type": "ipo", "beta": 0.1}) == {"type": "ipo", "beta": 0.1}


# The project's own profiles.


def test_params_in_git_have_the_form_that_dvc_writes() -> None:
    assert text_with(PARAMS, default_params()) == PARAMS


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train_dpo.epochs=0.1", "  epochs: 0.1"),
        ("train_dpo.loss.beta=0.1", "  loss: {type: sigmoid, beta: 0.1, label_smoothing: 0.0}"),
    ],
)
def test_an_experiment_changes_one_line_of_params(profile: Path, override: str, line: str, tmp_path: Path) -> None:
    """`dvc exp run -S train_dpo.loss.beta=0.1` writes params.yaml with `apply_overrides`."""
    params = tmp_path / "params.yaml"
    params.write_text(text_with(PARAMS, settings_of(profile)))
    before = params.read_text().splitlines()
    apply_overrides(params, [override])
    after = params.read_text().splitlines()
    assert [new for old, new in zip(before, after, strict=True) if old != new] == [line]


def test_the_profiles_of_the_documentation_are_there() -> None:
    assert {"default", "hh-local", "qwen2.5-0.5b-hh"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_a_profile_keeps_the_layout(profile: Path) -> None:
    own = text_with(PARAMS, settings_of(profile)).splitlines()
    assert [line for line in own if line.lstrip().startswith("#")] == [
        line for line in PARAMS.splitlines() if line.lstrip().startswith("#")
    ]
