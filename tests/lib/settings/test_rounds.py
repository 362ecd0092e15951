"""Rounds that cannot be what they say are refused before anything runs, by the names of their keys."""

from typing import Any

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.settings.declaration import block
from stages.lib.settings.named_models import require_kinds, require_like_reference, require_models
from stages.lib.settings.ref_logprobs import RefLogprobs
from stages.lib.settings.rounds import require_rounds, rounds_behind
from stages.lib.settings.sample_pairs import BestOfN, SamplePairs
from stages.lib.settings.sections import KINDS, default_params
from stages.lib.settings.train_dpo import TrainDpo
from stages.lib.settings.train_sft import TrainSft

ROUNDS = {"first": ("sft", 1), "second": ("dpo-first", 2)}  # of the rows: where they are sampled, and the round


def two_rounds() -> dict[str, Any]:
    """Settings of two rounds of online DPO, as params.yaml holds them."""
    values = default_params()
    for name, (start, number) in ROUNDS.items():
        model, rows = f"models/{start}", f"data/sampled/{name}"
        values["sample_pairs"][name] = block(SamplePairs, model=model, round=number)
        values["ref_logprobs"][f"for-{name}"] = block(RefLogprobs, model=model, tokens=rows)
        reference = f"data/ref_logprobs/for-{name}"
        values["train_dpo"][f"dpo-{name}"] = block(TrainDpo, model=model, tokens=rows, reference=reference)
    return values


def check(values: dict[str, Any]) -> None:
    params = {key: build(kind, values[key], f"params.yaml: {key}") for key, kind in KINDS.items()}
    for require in (require_models, require_kinds, require_like_reference, require_rounds):
        require(params)


def test_rounds_on_prompts_of_their_own_are_right() -> None:
    values = two_rounds()
    check(values)
    # Another second round, on the same prompts as the first one's second, is not behind it, nor it behind that.
    values["sample_pairs"]["other"] = block(SamplePairs, model="models/dpo-first", round=2)
    # A round of validation prompts, whose rows are then those held out.
    values["sample_pairs"]["held-out"] = block(SamplePairs, model="models/dpo-second", split="validation")
    values["ref_logprobs"]["sft"]["validation_tokens"] = "data/sampled/held-out"
    values["train_dpo"]["dpo"]["validation_tokens"] = "data/sampled/held-out/"
    check(values)


def test_rows_of_sampled_kinds_need_no_prepared_ones() -> None:
    values = two_rounds()
    values["sample_pairs"] = {"best": block(SamplePairs, model="models/base", makes=block(BestOfN))}
    held_out = block(SamplePairs, model="models/base", split="validation", makes=block(BestOfN))
    values["sample_pairs"]["held-out"] = held_out
    values["train_sft"] = {
        "sft": block(TrainSft, tokens="data/sampled/best", validation_tokens="data/sampled/held-out")
    }
    for section in ("train_rm", "ref_logprobs", "train_dpo", "evaluate_rm"):
        values[section] = {}
    values["fetch_model"] = {"rm": {"model": "a/b", "revision": "0" * 40}}
    values["evaluate"]["policies"].pop("dpo")
    values["score_samples"]["policies"].remove("dpo")
    values["prepare_data"]["kinds"] = ["prompts"]
    check(values)
    values["train_sft"]["sft"]["validation_tokens"] = "data/tokens"
    with pytest.raises(StageError, match=r"train_sft\.sft needs rows of kind sft, which prepare_data\.kinds lacks"):
        check(values)


def test_the_rounds_behind_a_model_are_followed_through_what_it_started_from() -> None:
    values = two_rounds()
    values["train_sft"]["more"] = block(TrainSft, model="models/dpo-second/step_100")
    params = {key: build(kind, values[key], key) for key, kind in KINDS.items()}
    assert [*rounds_behind("models/more", params)] == ["second", "first"]
    assert [*rounds_behind("./models/dpo-first", params)] == ["first"]
    assert [*rounds_behind("models/sft", params)] == []


SAME = "has prompts of round 1 of 500 prompts of sample_pairs.first, on which models/dpo-first was trained"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("sample_pairs.second.round", 1, f"params.yaml: sample_pairs.second: round 1 of 500 prompts {SAME}"),
        ("sample_pairs.second.prompts", 400, f"sample_pairs.second: round 2 of 400 prompts {SAME}"),
        (
            "sample_pairs.first.model",
            "models/dpo-second",
            "sample_pairs.first.model: models/dpo-second is trained on what is sampled from it; a graph has no cycle",
        ),
        ("sample_pairs.first.model", "models/sfd", "sample_pairs.first.model: models/sfd is neither there nor made"),
        (
            "sample_pairs.first.model",
            "models/rm",
            "reward_model names model itself, so that none takes part; then rewards",
        ),
        (
            "sample_pairs.second.reward_model",
            "models/sft",
            "expected a reward model or an ensemble of reward models, and",
        ),
        ("sample_pairs.first.samples_per_prompt", 1, "sample_pairs.first.samples_per_prompt must be at least 2"),
        ("sample_pairs.first.round", 0, "sample_pairs.first.round must be at least 1"),
        ("sample_pairs.first.split", "test", "sample_pairs.first.split: 'test' (str) is not one of: train, validation"),
        ("sample_pairs.first.makes.type", "best", "sample_pairs.first.makes.type: 'best' (str) is not one of"),
        (
            "sample_pairs.first.makes",
            {"type": "best_of_n", "least_gap": 0.1},
            "sample_pairs.first.makes.least_gap is not a known key",
        ),
        (
            "sample_pairs.first.makes",
            {"type": "best_of_n", "least_score": None},
            "ref_logprobs.for-first.tokens: expected rows of kind preference and split train, and sample_pairs.first "
            "makes sft of split train",
        ),
        (
            "sample_pairs.first.split",
            "validation",
            "ref_logprobs.for-first.tokens: expected rows of kind preference and split train, and sample_pairs.first "
            "makes preference of split validation",
        ),
        (
            "train_dpo.dpo-first.tokens",
            "data/sampled/frist",
            "train_dpo.dpo-first.tokens: data/sampled/frist is neither there nor made by a stage; did you mean",
        ),
        (
            "train_dpo.dpo-first.tokens",
            "models/sft",
            "train_dpo.dpo-first.tokens: expected token tables, and models/sft, which train_sft.sft makes, is a",
        ),
        (
            "train_dpo.dpo-first.tokens",
            "data/tokens/train",
            "lies in what tokenize_data makes; name that folder itself",
        ),
        (
            "train_dpo.dpo-first.tokens",
            "data/tokens",
            "ref_logprobs.for-first.tokens is data/sampled/first and train_dpo.dpo-first.tokens data/tokens: the "
            "log-probs must be of the same tokens",
        ),
    ],
)
def test_rounds_that_cannot_be_are_refused(where: str, value: Any, message: str) -> None:
    values = two_rounds()
    *above, last = where.split(".")
    below = values
    for part in above:
        below = below[part]
    below[last] = value
    with pytest.raises(StageError) as refused:
        check(values)
    assert message in str(refused.value)
