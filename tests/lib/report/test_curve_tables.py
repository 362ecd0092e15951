import math

import pytest

from stages.lib.command.errors import StageError
from stages.lib.report.curve_tables import MOST_COLUMNS, curve_in, read_curve, training_and_evaluation


def curve(text):
    return read_curve(text.encode(), "loss.csv")


def test_cells_become_numbers_and_empty_cells_nothing():
    found = curve("step,loss,validation/loss\n1,0.1,\n2,1e-3,0.25\n3,nan,\n")
    assert found.steps == [1, 2, 3]
    assert found.metrics == {"loss": [0.1, 0.001, None], "validation/loss": [None, 0.25, None]}
    assert found.points("loss") == ([1, 2], [0.1, 0.001])
    assert found.points("validation/loss") == ([2], [0.25])
    assert found.points("nowhere") == ([], [])


def test_an_infinite_value_is_one():
    assert curve("step,loss\n1,inf\n2,-inf\n").metrics == {"loss": [math.inf, -math.inf]}


def test_a_column_without_a_value_is_a_column():
    assert curve("step,loss\n1,\n").metrics == {"loss": [None]}


def test_names_may_hold_anything_and_lines_may_be_blank():
    found = curve('step,"a,\nb",</script>,url(#x\n1,1,2,3\n\n2,4,5,6\n')
    assert list(found.metrics) == ["a,\nb", "</script>", "url(#x"]
    assert found.steps == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "loss.csv is empty"),
        ("step,loss\n", "loss.csv holds no step"),
        ("step,loss\n1,2\n1,2,3,4\n", "loss.csv, line 3: expected 2 cells, found 4"),
        ("step,loss\n1\n", "loss.csv, line 2: expected 2 cells, found 1"),
        ('step,loss\n1,"2\n', "loss.csv is not a CSV table in UTF-8"),
        ("loss\n0.5\n", "column 'step' is missing, found: loss"),
        ("step,loss,loss\n1,2,3\n", "column 'loss' comes twice"),
        ("step,step\n1,2\n", "column 'step' comes twice"),
        ("step,\n1,2\n", "a column has no name"),
        ("step," + ",".join(map(str, range(100_000))), f"has 100001 columns, expected at most {MOST_COLUMNS}"),
        ("step,loss\n1,0.5\n2,high\n", "line 3: column 'loss' holds 'high', expected a number"),
        ("step,loss\n1,True\n", "line 2: column 'loss' holds 'True', expected a number"),
        ("step,loss\n1,1_0\n", "column 'loss' holds '1_0', expected a number"),
        ("step,loss\n1,1e308\n", "column 'loss' holds '1e308', expected a number of at most 1e+100"),
        ("step,loss\n1,-1e101\n", "column 'loss' holds '-1e101', expected a number of at most 1e+100"),
        ("step,loss\n1,0.5\n1,0.4\n", "line 3: column 'step' holds 1, expected a whole number above 1"),
        ("step,loss\n2,0.5\n1,0.4\n", "line 3: column 'step' holds 1, expected a whole number above 2"),
        ("step,loss\n,0.5\n", "line 2: column 'step' holds nothing"),
        ("step,loss\nnan,0.5\n", "line 2: column 'step' holds nothing"),
        ("step,loss\n-3,0.5\n", "line 2: column 'step' holds -3, expected a whole number above -1"),
        ("step,loss\n1.5,0.5\n", "line 2: column 'step' holds 1.5"),
        ("step,loss\ninf,0.5\n", "line 2: column 'step' holds inf"),
        ("step,loss\n99999999999999999999,0.5\n", "line 2: column 'step' holds 1e+20"),
    ],
)
def test_what_is_not_a_curve_is_named(text, message):
    with pytest.raises(StageError, match=r"loss\.csv") as caught:
        curve(text)
    assert message in str(caught.value)


def test_integers_beyond_int64_are_numbers():
    assert curve("step,loss\n1,99999999999999999999\n").metrics == {"loss": [1e20]}


def test_what_is_not_utf8_is_said_so():
    with pytest.raises(StageError, match=r"loss\.csv is not a CSV table in UTF-8"):
        read_curve(b"step,l\xffss\n1,2\n", "loss.csv")


def test_what_is_not_a_file_is_said_so(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "link.csv").symlink_to("nowhere")
    for name, trouble in {"folder": "is not a file", "link": "is not a file", "none": "does not exist"}.items():
        with pytest.raises(StageError, match=rf"{name}\.csv {trouble}"):
            curve_in(tmp_path / f"{name}.csv")


def test_a_metric_stands_with_its_held_out_twin():
    assert training_and_evaluation(["loss", "grad_norm", "validation/loss", "validation/only"]) == {
        "loss": ["loss", "validation/loss"],
        "grad_norm": ["grad_norm"],
        "only": ["validation/only"],
    }
