"""What is shown of a policy's rollouts: which rows, in which order, and what is refused."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer import Typer
from typer.testing import CliRunner

from stages.lib.command.errors import StageError
from stages.tools.show_samples import chosen, main

ROWS = pa.Table.from_pylist(
    [
        {"row": 0, "prompt": "a b", "response": "yes\x1b[2J", "ended": True, "score": 0.5, "kl": 1.0, "ids": [1]},
        {"row": 1, "prompt": "c", "response": "no", "ended": False, "score": 2.0, "kl": None, "ids": [2]},
        {"row": 2, "prompt": "a", "response": "maybe", "ended": True, "score": 0.5, "kl": 3.0, "ids": []},
        {"row": 3, "prompt": "d", "response": "no", "ended": True, "score": -1.0, "kl": 0.0, "ids": []},
    ]
)


@pytest.mark.parametrize(
    ("conditions", "sort", "rows"),
    [
        ([], [], [0, 1, 2, 3]),
        ([], ["score"], [3, 0, 2, 1]),
        ([], ["-score"], [1, 0, 2, 3]),
        ([], ["-score", "-kl"], [1, 2, 0, 3]),
        ([], ["kl"], [3, 0, 2, 1]),  # without one last
        ([], ["-kl"], [2, 0, 3, 1]),
        ([], ["response", "-row"], [2, 3, 1, 0]),
        (["ended = false"], [], [1]),
        (["ended=true", "kl>=1"], [], [0, 2]),
        (["kl != 3"], [], [0, 3]),  # what is not there is not another value either
        (["score < 0"], [], [3]),
        (["response = no"], [], [1, 3]),
        (["prompt ~ a"], [], [0, 2]),
        (["ids ~ 2"], [], [1]),
        (["score > nan"], ["-score"], []),
    ],
)
def test_rows_are_chosen_and_sorted(conditions: list[str], sort: list[str], rows: list[int]) -> None:
    assert chosen(ROWS, conditions, sort)["row"].to_pylist() == rows


@pytest.mark.parametrize(
    ("conditions", "sort", "message"),
    [
        ([], ["-scores"], "there is no column 'scores'; did you mean 'score'"),
        (["kl"], [], "--where 'kl': expected a column, one of"),
        (["kl > x"], [], "--where 'kl > x': kl is a number, not 'x'"),
        (["ended = 1"], [], "ended is true or false, not '1'"),
        (["ids = 1"], [], "ids holds lists"),
    ],
)
def test_what_cannot_be_read_is_refused(conditions: list[str], sort: list[str], message: str) -> None:
    with pytest.raises(StageError, match=message):
        chosen(ROWS, conditions, sort)


def test_what_is_shown(tmp_path: Path) -> None:
    (tmp_path / "ppo").mkdir()
    pq.write_table(ROWS, tmp_path / "ppo/rollouts.parquet")
    app = Typer()
    app.command()(main)
    options = ["--of", "ppo", "--sort", "-kl", "--where", "score = 0.5", "--count", "1", "--rollouts", str(tmp_path)]
    done = CliRunner().invoke(app, options)
    assert done.output.splitlines() == [
        f"{tmp_path}/ppo/rollouts.parquet: 2 of 4 responses, 1 shown",
        "",
        "row 2  ended true  score 0.5  kl 3",
        "  prompt   'a'",
        "  response 'maybe'",
    ]
    done = CliRunner().invoke(app, ["--of", "ppo", "--where", "row = 0", "--rollouts", str(tmp_path)])
    assert "'yes\\x1b[2J'" in done.output
    with pytest.raises(StageError, match=r"grpo/rollouts.parquet does not exist; there are rollouts of: ppo"):
        CliRunner().invoke(app, ["--of", "grpo", "--rollouts", str(tmp_path)], catch_exceptions=False)
