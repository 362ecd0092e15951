"""Settings of a pass over rows: the sections that share them, and what they refuse."""

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.settings.epochs import EpochSettings
from stages.lib.settings.train_dpo import TrainDpo
from stages.lib.settings.train_rm import TrainRm
from stages.lib.settings.train_sft import TrainSft
from tests.real_files import PROJECT

SECTIONS = {"train_sft": TrainSft, "train_rm": TrainRm, "train_dpo": TrainDpo}
PARAMS = {section: next(iter(load_yaml(PROJECT / "params.yaml")[section].values())) for section in SECTIONS}


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epochs", 0.0, "epochs must be above 0, found 0.0"),
        ("batch_size", 0, "batch_size must be at least 1, found 0"),
        ("eval_every", -1, "eval_every must be at least 1, found -1"),
        ("best_by", {"metric": "loss", "better": "less"}, "best_by.better: 'less' (str) is not one of: lower, higher"),
        ("early_stopping", {"patience": 0, "min_delta": 0.0}, "patience must be at least 1, found 0"),
        ("early_stopping", {"patience": 1, "min_delta": -0.1}, "min_delta must be at least 0, found -0.1"),
        ("keep", "worst", "'worst' (str) is not one of: best, last; did you mean 'best'?"),
    ],
)
def test_a_section_refuses_what_makes_no_run(section: str, key: str, value: object, message: str) -> None:
    assert isinstance(build(SECTIONS[section], PARAMS[section], section), EpochSettings)
    with pytest.raises(StageError) as error:
        build(SECTIONS[section], {**PARAMS[section], key: value}, section)
    assert message.split(";")[0] in str(error.value)
