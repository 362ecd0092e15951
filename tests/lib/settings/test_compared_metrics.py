"""What evaluations may be compared by, as the first stage knows it: parts of the reward, and sources by their names."""

from pathlib import Path
from typing import Any

import pytest

from stages.lib.command.errors import StageError
from stages.lib.settings.compared_metrics import require_held_out_metrics, require_validation_metrics
from stages.lib.settings.declaration import block
from stages.lib.settings.ensemble_member import EnsembleMember
from stages.lib.settings.rewards import RepetitionReward
from stages.lib.settings.sections import build_all, default_params
from tests.lib.settings.test_model_agreement import params


def compared_by(section: str, metric: str, **entry: Any) -> dict[str, Any]:
    held_out = {"best_by": {"metric": metric, "better": "higher"}}
    return params({section: {section.removeprefix("train_"): {"held_out": held_out, **entry}}})


@pytest.mark.parametrize("section", ["train_ppo", "train_grpo"])
def test_an_unknown_metric_is_refused_before_anything_runs(section: str) -> None:
    require_held_out_metrics(compared_by(section, "response/length"))
    message = (
        rf"^params\.yaml: {section}\..*\.held_out\.best_by\.metric: there is no metric 'response/lenght' here; did"
    )
    with pytest.raises(StageError, match=message):
        require_held_out_metrics(compared_by(section, "response/lenght"))
    with pytest.raises(StageError, match="no metric 'rewards/reward_model' here"):
        require_held_out_metrics(compared_by(section, "rewards/reward_model"))  # alone it is objective/scores
    require_held_out_metrics(params({section: {section.removeprefix("train_"): {"held_out": None}}}))


def test_the_parts_of_a_reward_are_known_by_name() -> None:
    members = {name: block(EnsembleMember) for name in ("one", "two")}
    of_entry = {"rewards": {"repeats": block(RepetitionReward)}}
    of_ensemble = of_entry | {"reward_model": f"data/ensembles/{members['one']['ensemble']}"}
    for entry, metric, is_there in (
        (of_entry, "rewards/repeats", True),
        (of_entry, "rewards/reward_model", True),
        (of_ensemble, "rewards/two", True),
        (of_ensemble, "rewards/reward_model", False),
    ):
        values = default_params()
        values["ensemble_member"] = members
        values["train_grpo"]["grpo"] |= entry
        values["train_grpo"]["grpo"]["held_out"]["best_by"]["metric"] = metric
        built = build_all(values, Path("params.yaml"))
        if is_there:
            require_held_out_metrics(built)
        else:
            with pytest.raises(StageError, match=f"no metric '{metric}' here"):
                require_held_out_metrics(built)


def test_a_source_of_several_may_be_the_one_that_counts() -> None:
    values = compared_by("train_grpo", "rewards/reward_model/second")
    with pytest.raises(StageError, match="no metric 'rewards/reward_model/second' here"):
        require_held_out_metrics(values)
    tasks = values["sources"].tasks
    several = {**tasks, "second": tasks["film_reviews"]}
    require_held_out_metrics(values | {"sources": values["sources"].model_copy(update={"tasks": several})})


@pytest.mark.parametrize("section", ["train_sft", "train_rm", "train_dpo"])
def test_a_metric_that_no_validation_row_has_is_refused_before_anything_runs(section: str) -> None:
    def compared(metric: str) -> dict[str, Any]:
        return params({section: {section.removeprefix("train_"): {"best_by": {"metric": metric, "better": "lower"}}}})

    require_validation_metrics(compared("loss"))
    with pytest.raises(
        StageError, match=rf"^params\.yaml: {section}\..*\.best_by\.metric: there is no metric 'lost' here"
    ):
        require_validation_metrics(compared("lost"))
