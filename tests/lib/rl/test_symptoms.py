"""What says that a run goes wrong: where each sign begins, and that the README has a row for it."""

import json
import re

import pytest

from stages.lib.rl.symptoms import SIGNS, new_in, seen_in, symptoms_of_curve
from tests.real_files import PROJECT

SECTION = (PROJECT / "README.md").read_text().split("## When it goes wrong")[1].split("\n## ")[0]


def history(name, *values, length=20.0):
    return [{name: value, "response/length": length} for value in values]


def lengths(*values):
    return [{"response/length": value} for value in values]


def names(curve):
    return [seen.sign.what for seen in seen_in(curve, len(curve))]


@pytest.mark.parametrize(
    ("sign", "fine", "wrong"),
    [
        ("KL explodes", history("objective/kl", 10.0), history("objective/kl", 10.1)),
        ("Length grows", lengths(20.0, 30.0), lengths(20.0, 30.1)),
        ("Entropy collapses", history("policy/entropy", 2.0, 0.51), history("policy/entropy", 2.0, 0.5)),
        (
            "The critic explains nothing",
            history("value/explained_variance", -0.4, 0.1, 0.31),
            history("value/explained_variance", -0.4, 0.1, 0.3),
        ),
        ("Groups have no variance", history("group/without_variance", 0.5), history("group/without_variance", 0.51)),
        ("Replies in a group repeat", history("group/distinct", 0.51), history("group/distinct", 0.5)),
        (
            "Reward stalls",
            history("objective/scores", *[0.0] * 5, *[-1.0] * 5, *[0.0] * 4, 0.1),
            history("objective/scores", *[0.0] * 5, *[1.0] * 5, *[0.0] * 5),
        ),
    ],
)
def test_where_a_sign_begins(sign, fine, wrong):
    assert names(fine) == []
    assert names(wrong) == [sign]


def test_what_was_not_measured_or_cannot_be_compared_yet_says_nothing():
    assert names([{}]) == []
    assert names(history("objective/kl", 99.0, length=0.0)) == []
    assert names(history("policy/entropy", 0.0, 0.0)) == []
    assert names(history("value/explained_variance", -1.0, -1.0)) == []
    assert names(history("objective/scores", *[1.0] * 9)) == []
    assert names([*history("value/explained_variance", -1.0, -1.0), {}]) == []


def test_with_dynamic_sampling_the_groups_that_were_left_out_count() -> None:
    """Those that are kept gain and vary, whatever the policy does."""
    kept = {"objective/scores": 0.5, "group/without_variance": 0.0}
    left_out = {"dynamic_sampling/unfiltered_scores": 0.1, "dynamic_sampling/unfiltered_without_variance": 0.9}
    curve = [{**kept, "objective/scores": float(phase)} for phase in range(10)]
    assert names(curve) == []
    assert names([{**row, **left_out} for row in curve]) == ["Reward stalls", "Groups have no variance"]


def test_a_sign_is_said_when_it_begins_and_counted_afterwards():
    curve = history("group/distinct", 0.9, 0.4, 0.3, 0.8, 0.2)
    said = [[seen.line for seen in new_in(curve, phase)] for phase in range(1, 6)]
    assert [len(lines) for lines in said] == [0, 1, 0, 0, 1]
    assert said[1] == ["Replies in a group repeat: 0.4 (group/distinct at most 0.5); see README.md, When it goes wrong"]
    assert symptoms_of_curve(curve) == [
        "Replies in a group repeat in 3 of 5 phases, last in phase 5: 0.2 at the worst (group/distinct at most 0.5)."
    ]
    assert symptoms_of_curve(history("objective/kl", 40.0, 20.0)) == [
        "KL explodes in 2 of 2 phases, last in phase 2: 2 at the worst (objective/kl / response/length above 0.5)."
    ]


def test_the_readme_has_each_sign_with_its_threshold():
    rows = [
        [cell.strip().replace("`", "") for cell in line.split("|")[1:3]]
        for line in SECTION.splitlines()
        if line.startswith("| ")
    ]
    assert rows[1:] == [[sign.what, sign.condition] for sign in SIGNS]


def keys_in(schema):
    """All keys that a JSON schema knows."""
    below = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    own = schema.get("properties", {}) if isinstance(schema, dict) else {}
    return {*own}.union(*map(keys_in, below))


def test_the_readme_turns_keys_that_there_are():
    there = keys_in(json.loads((PROJECT / "schemas/params.schema.json").read_text()))
    turned = [line.split("|")[3] for line in SECTION.splitlines() if line.startswith("| ")]
    named = {part for cell in turned for key in re.findall(r"`([a-z_.]+)`", cell) for part in key.split(".")}
    assert len(named) > 10
    assert named - there == set()
