"""What is said of given reward models, and of models on the way, before anything runs."""

from pathlib import Path
from typing import Any

import pytest

from stages.lib.command.errors import StageError
from stages.lib.settings.model_agreement import require_models_on_the_way, require_readable_reward_models
from stages.lib.settings.sections import build_all, default_params
from tests.given_reward_models import save_classifier, save_tokenizer
from tests.stages.tiny_pipeline import lay_over


def params(changes: dict[str, Any]) -> dict[str, Any]:
    values = default_params()
    lay_over(values, changes)
    return build_all(values, Path("params.yaml"))


def given(tmp_path: Path) -> str:
    save_classifier(tmp_path / "given", "distilbert", labels={0: "bad", 1: "good"})
    save_tokenizer(tmp_path / "given")
    return str(tmp_path / "given")


@pytest.mark.parametrize("section", ["train_ppo", "train_grpo", "evaluate_rm", "score_samples"])
def test_a_given_reward_model_needs_a_clear_label(section: str, tmp_path: Path) -> None:
    def with_label(label: str | None) -> dict[str, Any]:
        changes = {"reward_model": given(tmp_path), "reward_label": label}
        names = {"train_ppo": "ppo", "train_grpo": "grpo", "evaluate_rm": "rm"}
        return params({section: {names[section]: changes} if section in names else changes})

    require_readable_reward_models(with_label("good"))
    for label, says in ((None, "has 2 labels; name the one"), ("god", r"no label 'god'.*did you mean 'good'")):
        with pytest.raises(StageError, match=rf"^params\.yaml: {section}[.a-z]*: .*given {says}|given has {says}"):
            require_readable_reward_models(with_label(label))


def test_a_reward_model_of_the_pipeline_has_no_labels() -> None:
    require_readable_reward_models(params({}))
    message = r"^params\.yaml: train_ppo\.ppo\.reward_label: models/rm, which train_rm\.rm makes, has one head"
    with pytest.raises(StageError, match=message):
        require_readable_reward_models(params({"train_ppo": {"ppo": {"reward_label": "good"}}}))


def test_a_fetched_reward_model_may_have_labels() -> None:
    fetched = {"fetch_model": {"good": {"model": "a/b", "revision": "0" * 40}}}
    ppo = {"train_ppo": {"ppo": {"reward_model": "models/good", "reward_label": "good"}}}
    values = default_params()
    lay_over(values, ppo)
    require_readable_reward_models(build_all(values | fetched, Path("params.yaml")))


@pytest.mark.parametrize("section", ["train_ppo", "train_grpo", "score_samples"])
def test_what_scores_would_be_standardised_by_must_be_there(section: str, tmp_path: Path) -> None:
    def asking_of(model: str) -> dict[str, Any]:
        changes = {"reward_model": model, "standardise_reward": True}
        names = {"train_ppo": "ppo", "train_grpo": "grpo"}
        return params({section: {names[section]: changes} if section in names else changes})

    require_readable_reward_models(asking_of("models/rm"))
    message = (
        rf"^params\.yaml: {section}[.a-z]*\.standardise_reward: models/rm/step_5 is .* of which train_rm\.rm leaves no"
    )
    with pytest.raises(StageError, match=message):
        require_readable_reward_models(asking_of("models/rm/step_5"))
    save_classifier(tmp_path / "given", "llama")
    with pytest.raises(
        StageError, match=rf"^params\.yaml: {section}[.a-z]*: .*given/config.json has no 'mean' and 'std'"
    ):
        require_readable_reward_models(asking_of(str(tmp_path / "given")))
    save_classifier(tmp_path / "scaled", "llama", mean=0.5, std=2.0)
    require_readable_reward_models(asking_of(str(tmp_path / "scaled")))


@pytest.mark.parametrize(
    ("path", "saves", "refused"),
    [
        ("models/dpo/step_200", {"steps": 100, "keep_last_k": None}, False),
        ("models/dpo/step_250", {"steps": 100, "keep_last_k": None}, True),
        ("models/dpo/step_0", {"steps": 100, "keep_last_k": None}, True),
        ("models/dpo/step_200", None, True),
        ("models/dpo/adapter", {"steps": 100, "keep_last_k": None}, True),
        ("models/dpo", None, False),
    ],
)
def test_a_model_on_the_way_is_one_that_is_kept(path: str, saves: dict[str, Any] | None, refused: bool) -> None:
    values = default_params()
    values["evaluate"]["policies"]["before"] = path
    values["train_dpo"]["dpo"]["save_every"] = saves
    built = build_all(values, Path("params.yaml"))
    if not refused:
        require_models_on_the_way(built)
        return
    message = (
        rf"^params\.yaml: evaluate\.policies\.before: train_dpo\.dpo makes no folder {path} \(train_dpo\.dpo\.save"
    )
    with pytest.raises(StageError, match=message):
        require_models_on_the_way(built)
