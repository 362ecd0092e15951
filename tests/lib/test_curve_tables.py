import math

import pytest

from stages.lib.curve_tables import read_curve, training_and_evaluation
from stages.lib.errors import StageError


def test_cells_become_numbers_and_empty_cells_nan():
    curve = read_curve("step,loss,eval/loss\n1,0.1,\n2,1e-3,0.25\n3,nan,\n", "loss.csv")
    assert list(curve.index) == [1, 2, 3]
    assert list(curve["loss"])[:2] == [0.1, 0.001]
    assert math.isnan(curve["loss"][3])
    assert list(curve["eval/loss"].dropna()) == [0.25]


def test_a_column_without_a_value_is_a_column():
    assert list(read_curve("step,loss\n1,\n", "loss.csv").columns) == ["loss"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "loss.csv is no CSV table"),
        ("step,loss\n1,2\n1,2,3,4\n", "loss.csv is no CSV table"),
        ("loss\n0.5\n", "column 'step' is missing, found: loss"),
        ("step,loss\n1,0.5\n2,high\n", "column 'loss' holds 'high', expected a number"),
        ("step,loss\n1,True\n", "column 'loss' holds True, expected a number"),
        ("step,loss\n1,0.5\n1,0.4\n", "column 'step' must hold each step once"),
        ("step,loss\n,0.5\n", "column 'step' must hold each step once"),
    ],
)
def test_what_is_no_curve_is_named(text, message):
    with pytest.raises(StageError, match=r"loss\.csv") as caught:
        read_curve(text, "loss.csv")
    assert message in str(caught.value)


def test_a_metric_stands_with_its_held_out_twin():
    assert training_and_evaluation(["loss", "grad_norm", "eval/loss", "eval/only"]) == {
        "loss": ["loss", "eval/loss"],
        "grad_norm": ["grad_norm"],
        "only": ["eval/only"],
    }
