"""Prompts by their pass rates: what is kept, the control, and a policy that trains on either."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.lib.command.jsonl import read_jsonl
from stages.lib.data.token_tables import PROMPT_SCHEMA, read_table
from stages.lib.rl.chosen_prompts import chosen_prompts, drawn_places, pass_rate
from stages.lib.settings.check import check_settings
from stages.lib.settings.declaration import block
from stages.lib.settings.pass_rates import PassRates
from tests.stages.test_rewards import function, with_own_functions
from tests.stages.test_train_grpo import rollouts_of
from tests.stages.tiny_pipeline import call, change, contents, inside, read_yaml, refusal, write_yaml

Copy = Callable[..., Path]
BY_HAND = SimpleNamespace(keep_from=0.25, keep_to=0.75)


def test_prompts_are_chosen_by_hand() -> None:
    rates = [0.0, 0.25, 0.5, 1.0, 0.75, 0.8]
    chosen = chosen_prompts(rates, BY_HAND, seed=1)
    assert (chosen.kept, chosen.too_hard, chosen.too_easy) == ([1, 2, 4], [0], [3, 5])
    assert len(chosen.control) == 3
    assert chosen.control == sorted({*chosen.control})
    assert pass_rate([0.5, 0.6, 2.0, -1.0], 0.5) == 0.5


def test_the_control_is_drawn_from_all_prompts() -> None:
    """Of 1,000 prompts of which 300 are kept, 300 are drawn, and of these about 90 are among those that are kept."""
    rates = [0.5] * 300 + [0.0] * 700
    chosen = chosen_prompts(rates, BY_HAND, seed=5)
    assert len(chosen.control) == 300
    assert 60 < len({*chosen.control} & {*chosen.kept}) < 120
    assert chosen.control != chosen_prompts(rates, BY_HAND, seed=6).control
    assert drawn_places(1000, 300, 5, "prompts") != chosen.control


def with_rates(folder: Path, **changed: Any) -> None:
    settings = read_yaml(folder / "params.yaml")
    keys = {"samples_per_prompt": 4, "max_new_tokens": 12, "passes_above": 0.0, "keep_from": 0.25, "keep_to": 0.75}
    settings["pass_rates"] = {"first": block(PassRates, **(keys | changed))}
    write_yaml(folder / "params.yaml", settings)


def test_a_policy_trains_on_what_is_kept(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    with_rates(folder)
    call(folder, "pass_rates@first")
    own, results = folder / "data/pass_rates/first", json.loads((folder / "metrics/pass_rates/first.json").read_text())
    rows = [*read_jsonl(own / "pass_rates.jsonl")]
    asked = read_table(folder / "data/tokens/train/prompts.arrow", PROMPT_SCHEMA)
    assert [row["row"] for row in rows] == list(asked["row"][:])
    kept, control = (read_table(own / part / "train/prompts.arrow", PROMPT_SCHEMA) for part in ("kept", "control"))
    assert [*kept["row"][:]] == [row["row"] for row in rows if 0.25 <= row["pass_rate"] <= 0.75]
    assert all(row["pass_rate"] == sum(reward > 0 for reward in row["rewards"]) / 4 for row in rows)
    assert len(kept) == len(control) == results["kept"] > 0
    assert results["prompts"] == results["kept"] + results["too_hard"] + results["too_easy"] == len(asked)
    assert results["too_hard"] + results["too_easy"] > 0
    change(folder / "params.yaml", {"train_grpo": {"grpo": {"tokens": "data/pass_rates/first/kept"}}})
    with inside(folder):
        check_settings()
    call(folder, "train_grpo")
    assert {rollout["row"] for rollout in rollouts_of(folder)} <= {*kept["row"][:]}


def test_responses_are_drawn_as_the_entry_says(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    """Of the likeliest token alone, all responses to a prompt are one, so that all of them pass, or none."""
    folder = copy_of_tiny()
    with_rates(folder, prompts=8, top_k=1)
    assert "no prompt is left of 8; widen keep_from and keep_to" in refusal(folder, "pass_rates@first", capsys)


def test_chunks_change_nothing_of_what_is_chosen(copy_of_tiny: Copy) -> None:
    """The random numbers of a response belong to its prompt's row."""
    whole, folder = copy_of_tiny("whole"), copy_of_tiny()
    for project, rows in ((whole, 512), (folder, 3)):
        with_rates(project)
        change(project / "runtime.yaml", {"default": {"rows_per_partial_result": rows}})
        call(project, "pass_rates@first")
    for part in ("kept", "control"):
        assert contents(whole / "data/pass_rates/first" / part) == contents(folder / "data/pass_rates/first" / part)


def test_another_function_gives_other_rates(copy_of_tiny: Copy) -> None:
    """Though all settings are the same: what was finished with the one is not published for the other."""
    folder = with_own_functions(copy_of_tiny())
    own = {"reward_model": "models/sft", "rewards": {"own": function("film")}}
    with_rates(folder, **own, keep_from=0.0, keep_to=1.0)
    means = []
    for worth in ("0.25", "-2.0"):
        (folder / "rewards/shared.py").write_text(f"WORTH = {worth}\n")
        call(folder, "pass_rates@first")
        means.append(json.loads((folder / "metrics/pass_rates/first.json").read_text())["reward_mean"])
    assert means[1] == pytest.approx(-8 * means[0])
    assert means[0] > 0


def test_what_cannot_be_is_one_line(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of_tiny()
    with_rates(folder, passes_above=1e6)
    message = refusal(folder, "pass_rates@first", capsys)
    assert "pass_rates.first: no prompt is left of" in message
    with_rates(folder, prompts=100_000)
    message = refusal(folder, "pass_rates@first", capsys)
    assert "pass_rates.first.prompts: data/tokens/train/prompts.arrow has" in message
    with_rates(folder, keep_from=0.8)
    assert "keep_from (0.8) must not be above keep_to (0.75)" in refusal(folder, "pass_rates@first", capsys)
