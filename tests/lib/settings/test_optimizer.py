"""What an `optimizer:` block may hold."""

from typing import Any

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.sections import default_params

GOOD = default_params()["train_sft"]["sft"]["optimizer"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("learning_rate", 0.0, "above 0"),
        ("warmup_ratio", 1.5, "at least 0 and at most 1"),
        ("max_grad_norm", 0.0, "above 0"),
        ("beta1", 1.0, "at least 0 and below 1"),
        ("beta2", 1.0, "at least 0 and below 1"),
        ("weight_decay", -0.1, "at least 0"),
        ("ema_decay", 1.0, "above 0 and below 1"),
        ("ema_decay", 0.0, "above 0 and below 1"),
        ("moments", "4bit", "not one of: float32, 8bit, paged, paged_8bit"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(key: str, value: Any, expected: str) -> None:
    build(OptimizerSettings, GOOD, "params.yaml: train_sft.optimizer")
    with pytest.raises(StageError, match=f"params.yaml: train_sft.optimizer.*{key}.*{expected}"):
        build(OptimizerSettings, {**GOOD, key: value}, "params.yaml: train_sft.optimizer")


def test_an_average_needs_the_moments_of_plain_adamw() -> None:
    values = {**GOOD, "moments": "8bit"}
    build(OptimizerSettings, values, "params.yaml: train_sft.optimizer")
    with pytest.raises(StageError, match="ema_decay needs moments: float32, found 8bit; set ema_decay: null"):
        build(OptimizerSettings, {**values, "ema_decay": 0.9}, "params.yaml: train_sft.optimizer")
