"""Every key of params.yaml and runtime.yaml refuses what no run could use, and names itself and the bound."""

import functools
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from stages.lib.command import wrong_values
from stages.lib.command.errors import StageError, one_line
from stages.lib.command.params import build
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.settings.runtime import runtime_of
from stages.lib.settings.sections import KINDS, default_params, read_all_params
from tests.real_files import PROJECT

PARAMS = default_params()
RUNTIME = load_yaml(PROJECT / "runtime.yaml")
ABSURD = {
    "negative": -1,
    "1e30": 1e30,
    "2**70": 2**70,
    "4,001 digits": 10**4000,  # about as many as YAML is read with
    "infinite": float("inf"),
    "not a number": float("nan"),
    "empty": "",
    "a million characters": "x" * 10**6,
    "NUL": "a\0",
    "half a surrogate pair": "\ud800",
    "nested lists": [[[10**4000]]],
}


@pytest.fixture(autouse=True, scope="module")
def each_schema_made_once() -> Iterator[None]:
    """A refusal makes the schema of its section, which takes most of its time; one user meets one of them."""

    class OfOneSection(TypeAdapter):
        json_schema = functools.cache(TypeAdapter.json_schema)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrong_values, "TypeAdapter", functools.cache(OfOneSection))
        yield


def keys_of(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key, sections and what is in them."""
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*above, key))


def with_value(values: dict[str, Any], key: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = deepcopy(values)
    section = changed
    for name in key[:-1]:
        section = section[name]
    section[key[-1]] = value
    return changed


def refusal_of_params(key: tuple[str, ...], value: Any) -> str:
    top = key[0]
    changed = with_value({top: PARAMS[top]}, key, value)[top]
    with pytest.raises(StageError) as caught:
        build(KINDS[top], changed, f"params.yaml: {top}")
    return str(caught.value)


@pytest.mark.parametrize("name", ABSURD)
def test_every_key_of_params_refuses_an_absurd_value(name: str) -> None:
    for key in keys_of(PARAMS):
        said = refusal_of_params(key, ABSURD[name])
        assert said.startswith(f"params.yaml: {key[0]}")
        assert key[-1] in said
        assert len(one_line(said)) <= 1010


@pytest.mark.parametrize("name", ABSURD)
def test_every_key_of_runtime_refuses_an_absurd_value(name: str) -> None:
    for key in keys_of(RUNTIME):
        with pytest.raises(StageError) as caught:
            runtime_of("train_rm", with_value(RUNTIME, key, ABSURD[name]), Path("runtime.yaml"))
        assert str(caught.value).startswith("runtime.yaml: ")
        assert key[-1] in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 2**32, "seed must be at least 0 and below 4294967296, found 4294967296"),
        (
            "train_sft.sft.batch_size",
            2**70,
            "train_sft.sft.batch_size must be at least 1 and at most 2147483647, found 118059",
        ),
        ("train_sft.sft.batch_size", 1.0, "train_sft.sft.batch_size: expected a whole number, found 1.0 (float)"),
        ("train_sft.sft.epochs", 10**400, "train_sft.sft.epochs: expected a number that a float can hold, found 1000"),
        ("train_sft.sft.epochs", 0, "train_sft.sft.epochs must be above 0, found 0"),
        (
            "train_sft.sft.epochs",
            2e9,
            "train_sft.sft.epochs must be above 0 and at most 1000000000.0, found 2000000000.0",
        ),
        (
            "train_sft.sft.optimizer.beta1",
            1.0,
            "train_sft.sft.optimizer.beta1 must be at least 0 and below 1, found 1.0",
        ),
        ("train_ppo.ppo.temperature", 1e-30, "train_ppo.ppo.temperature must be at least 0.001, found 1e-30"),
        (
            "train_ppo.ppo.max_new_tokens",
            2**21,
            "train_ppo.ppo.max_new_tokens must be at least 1 and at most 1048576, found",
        ),
        ("evaluate.temperature", 1e-30, "temperature must be 0 (greedy) or at least 0.001, found 1e-30"),
        ("evaluate.bootstrap_resamples", 10**9, "bootstrap_resamples must be at least 100 and at most 1000000, found"),
        (
            "prepare_base.scratch.base.hidden_size",
            2 * 10**9,
            "scratch.base.hidden_size must be at least 1 and at most 1000000",
        ),
        ("train_rm.rm.model", "", "train_rm.rm.model: expected a text of 1 to 4096 characters, found ''"),
        (
            "train_ppo.ppo.reward_model",
            "y" * 5000,
            "train_ppo.ppo.reward_model: expected a text of 1 to 4096 characters, found",
        ),
        (
            "prepare_base.scratch.base.special_tokens",
            [""],
            "prepare_base.scratch.base.special_tokens[0]: expected a text of 1 to 4096 characters",
        ),
        (
            "evaluate.policies",
            {"": "models/sft"},
            "a key of params.yaml: evaluate.policies: expected a name of letters",
        ),
        ("evaluate.policies", {"a": 5}, "evaluate.policies.a: expected text, found 5 (int)"),
    ],
)
def test_the_bound_that_counts_is_named(key: str, value: Any, message: str) -> None:
    assert message in refusal_of_params(tuple(key.split(".")), value)


def test_what_belongs_to_deepspeed_is_held_to_what_json_holds() -> None:
    def runtime(value: Any) -> Any:
        return runtime_of("train_rm", with_value(RUNTIME, ("default", "deepspeed"), {"a": value}), Path("runtime.yaml"))

    whole = {"b": [1, 1e12, True, None, "text", 2**40]}
    assert runtime(whole).deepspeed == {"a": whole}
    for value in (float("inf"), [2**64], {"c": {"d": float("nan")}}, [[""]]):
        with pytest.raises(StageError, match=r"runtime.yaml: train_rm.deepspeed.a"):
            runtime(value)


def test_the_sections_are_those_of_the_committed_file() -> None:
    assert read_all_params(PROJECT / "params.yaml").keys() == KINDS.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_mr: {}\n", "no stage reads 'train_mr'; did you mean 'train_rm'?"),
        ("seed: 1\nkernels: portable\ntrust_remote_code: false\n", "sources is missing"),
    ],
)
def test_a_section_unknown_or_missing_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(StageError) as caught:
        read_all_params(tmp_path / "params.yaml")
    assert message in str(caught.value)
