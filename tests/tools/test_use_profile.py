"""Profiles: laid over the defaults of the settings, never over what params.yaml happens to hold."""

import subprocess
import sys
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update
from ruamel.yaml import YAML

from stages.lib.settings.declaration import block
from stages.lib.settings.preference_loss import IpoLoss, SigmoidLoss
from stages.lib.settings.rewards import MathReward, OverlongReward
from stages.lib.settings.sections import default_params
from stages.tools.params_text import params_text
from stages.tools.use_profile import declared_params, merged, settings_of
from tests.real_files import PROJECT

PARAMS = (PROJECT / "params.yaml").read_text(encoding="utf-8")
PROFILES = [PROJECT / "profiles/default.yaml", *sorted((PROJECT / "profiles").glob("*.yaml"))]
SMALL = """\
# A comment of the profile's own.
sources:
  files:
    mine: {path: data/raw/mine, columns: {question: prompt, answer: chosen}}
  tasks: {}
prepare_data:
  kinds:
    - sft
train_dpo:
  dpo: {loss: {type: ipo, beta: 0.1}}
  other: {epochs: 2.0}
train_rm: {}
train_sft:
  sft: {optimizer: {learning_rate: 1e-5}}
"""


def text_of(settings: dict) -> str:
    return params_text(settings, declared_params())


def laid_over(changes: dict) -> dict:
    return merged(default_params(), changes, declared_params())


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


def test_a_named_block_of_any_type_has_the_defaults_of_its_type() -> None:
    rewards = {"right": {"type": "math", "answer_after": "####"}, "brief": {"type": "overlong"}}
    found = laid_over({"train_grpo": {"grpo": {"rewards": rewards}}})["train_grpo"]["grpo"]["rewards"]
    assert found == {"right": block(MathReward, answer_after="####"), "brief": block(OverlongReward)}


def test_a_profile_changes_its_keys_alone(project: Path) -> None:
    done = use(project, "small")
    assert done.returncode == 0, done.stderr
    found = values((project / "params.yaml").read_text())
    expected = default_params()
    expected["prepare_data"]["kinds"] = ["sft"]
    expected["train_sft"]["sft"]["optimizer"]["learning_rate"] = 1e-5
    expected["train_rm"] = {}
    expected["sources"]["tasks"] = {}
    assert found["train_dpo"].keys() == {"dpo", "other"}
    assert found["train_dpo"]["dpo"] == expected["train_dpo"]["dpo"] | {"loss": block(IpoLoss)}
    other = found["train_dpo"]["other"]  # a name that the default run lacks has the defaults of its keys
    assert (other["epochs"], other["optimizer"]["beta2"], other["loss"]["type"]) == (2.0, 0.95, "sigmoid")
    mine = found["sources"]["files"]["mine"]
    assert mine["columns"] == {"question": "prompt", "answer": "chosen"}
    assert (mine["format"], mine["kinds"]) == ("auto", ["sft"])
    for section in ("train_dpo", "sources"):
        del found[section], expected[section]
    assert found == expected


def test_what_a_profile_changes_is_told(project: Path) -> None:
    lines = use(project, "small").stdout.splitlines()
    assert lines[0].startswith("params.yaml holds profile small: ")
    assert {
        "  sources.tasks: ['film_reviews'] -> []",
        "  sources.files: [] -> ['mine']",
        "  sources.files.mine.path: data/raw/mine",
        "  prepare_data.kinds: ['sft', 'preference', 'prompts'] -> ['sft']",
        "  train_sft.sft.optimizer.learning_rate: 0.0015 -> 1e-05",
        "  train_rm: ['rm'] -> []",
        "  train_dpo: ['dpo'] -> ['dpo', 'other']",
    } <= set(lines)
    assert not [line for line in lines if line.startswith(("  train_rm.", "  sources.tasks."))]


@pytest.mark.parametrize("name", ["small", "hh-local", "own-reward-model"])
def test_going_back_gives_the_bytes_of_the_default(project: Path, name: str) -> None:
    if name != "small":
        (project / f"profiles/{name}.yaml").write_bytes((PROJECT / f"profiles/{name}.yaml").read_bytes())
    use(project, name)
    assert (project / "params.yaml").read_text() != PARAMS
    assert use(project, "default").returncode == 0
    assert (project / "params.yaml").read_text() == PARAMS


def test_each_key_is_explained_where_it_first_stands() -> None:
    lines = text_of(default_params()).splitlines()
    learning_rates = [line.strip() for line in lines if line.lstrip().startswith("learning_rate:")]
    assert learning_rates[0].split("  #") == ["learning_rate: 1.5e-3   ", " at its peak"]
    assert all("#" not in line for line in learning_rates[1:])
    adapters = [line.strip() for line in lines if line.strip().startswith("# rank: 16")]  # of keys that are null
    assert adapters[0].startswith("# rank: 16   ")
    assert "of the update s·B·A" in adapters[0]


def test_a_profile_does_not_stand_on_the_one_before(project: Path) -> None:
    (project / "profiles/long.yaml").write_text("train_rm: {rm: {epochs: 9.0}}\n")
    use(project, "small")
    assert use(project, "long").returncode == 0
    assert values((project / "params.yaml").read_text()) == laid_over({"train_rm": {"rm": {"epochs": 9.0}}})


@pytest.mark.parametrize(
    ("left_out", "added"),
    [
        ("      penalty: ", ""),
        ("", "train_kto:\n  beta: 0.1\n"),
        ("    save_dtype: float32\n", "extra: {a: 1}\n"),
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
        ("train_rm: {rm: {epoch: 3}}", ": train_rm.rm.epoch is not a known key; did you mean 'epochs'?"),
        (
            "train_rm: {rm: {optimizer: {learning_rat: 1}}}",
            ": train_rm.rm.optimizer.learning_rat is not a known key; did you mean 'learning_rate'?",
        ),
        ("train_rm: 3", ": train_rm: expected a mapping, found 3 (int)"),
        ("train_rm:", ": train_rm: expected a mapping, found nothing"),
        ("seed: {a: 1}", ": seed: expected a whole number, found {'a': 1} (dict)"),
        ("train_rm: {rm: {epochs: -1.0}}", ": train_rm.rm.epochs must be above 0, found -1.0"),
        ("train_rm: {r m: {epochs: 1.0}}", ": train_rm: expected a name of letters, digits, _ and -, found 'r m'"),
        ("- seed", ": expected sections (key: value), found list"),
        ("seed: [", ", line 1: not valid YAML"),
    ],
)
def test_a_wrong_profile_is_refused_and_changes_nothing(project: Path, profile: str, message: str) -> None:
    (project / "profiles/wrong.yaml").write_text(profile)
    done = use(project, "wrong")
    assert done.returncode == 2
    assert f"profiles/wrong.yaml{message}" in done.stderr
    assert done.stderr.startswith("error: ")
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
    use(project, "small")
    text = (project / "params.yaml").read_text()
    edited = text.replace("seed: 17", "seed: 18").replace("    iterations: 11  ", "    iterations: 12  ", 1)
    (project / "params.yaml").write_text(edited)
    done = use(project, "default")
    assert done.returncode == 2
    assert "against profile small it differs in: seed, train_ppo.ppo.iterations." in done.stderr
    assert (project / "params.yaml").read_text() == edited
    assert use(project, "default", "--drop-edits").returncode == 0
    assert (project / "params.yaml").read_text() == PARAMS


def test_a_missing_params_file_is_told(project: Path) -> None:
    (project / "params.yaml").unlink()
    done = use(project, "small")
    assert done.returncode == 2
    assert done.stderr.startswith("error: params.yaml is missing")


def test_a_block_takes_the_profiles_type_or_single_keys_of_its_own() -> None:
    def loss(changes: dict) -> dict:
        return laid_over({"train_dpo": {"dpo": {"loss": changes}}})["train_dpo"]["dpo"]["loss"]

    assert loss({"beta": 0.1}) == block(SigmoidLoss)
    assert loss({"type": "sigmoid", "beta": 0.1}) == block(SigmoidLoss)
    assert loss({"type": "ipo", "beta": 0.3}) == block(IpoLoss, beta=0.3)


def test_a_mapping_of_names_is_what_the_profile_says() -> None:
    assert laid_over({"evaluate": {"policies": {"sft": "models/sft"}}})["evaluate"]["policies"] == {"sft": "models/sft"}


# The project's own profiles.


def test_params_in_git_are_what_the_settings_say() -> None:
    assert text_of(default_params()) == PARAMS


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_the_text_holds_the_settings_in_the_form_that_dvc_writes(profile: Path) -> None:
    text = text_of(settings_of(profile))
    assert values(text) == settings_of(profile)
    assert dumps_yaml(parse_yaml_for_update(text, "params.yaml")) == text


@pytest.mark.parametrize(
    ("override", "line"),
    [("train_dpo.dpo.epochs=0.1", "    epochs: 0.1"), ("train_dpo.dpo.loss.beta=0.1", "      beta: 0.1")],
)
def test_an_experiment_changes_one_line_of_params(override: str, line: str, tmp_path: Path) -> None:
    """`dvc exp run -S train_dpo.dpo.loss.beta=0.1` writes params.yaml with `apply_overrides`."""
    params = tmp_path / "params.yaml"
    params.write_text(PARAMS)
    before = params.read_text().splitlines()
    apply_overrides(params, [override])
    after = params.read_text().splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert [new.partition("#")[0].rstrip() for new in changed] == [line]


def test_the_profiles_of_the_documentation_are_there() -> None:
    named = {"hh-local", "qwen2.5-0.5b-hh", "sft-only", "dpo-from-instruct", "own-reward-model"}
    large = {"qwen2-1.5b-firefly-sft", "qwen2.5-1.5b-rm", "opt-350m-hh-rm", "llama-3.1-8b-ultrafeedback-dpo"}
    generated = {"online-dpo", "rejection-sampling", "arithmetic"}
    assert {"default", *named, *large, *generated} <= {path.stem for path in PROFILES}
