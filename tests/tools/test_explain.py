"""`make explain`: every key with its type, bounds, default, unit and source, or one line that names the nearest key."""

import subprocess
import sys

import pytest

from stages.lib.command.json_schema import Declared
from stages.lib.operations.stage_names import DATA_STAGES, STAGES
from stages.lib.settings.runtime import Runtime
from stages.lib.settings.sections import Params
from stages.lib.settings.train_sft import TrainSft
from stages.tools.explain import RUNTIME, WIDTH, explained, files, found_at
from tests.real_files import PROJECT


def explain(*key: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "stages.tools.explain", *key], cwd=PROJECT, capture_output=True, text=True, check=False
    )


def test_a_block_shows_each_of_its_types() -> None:
    done = explain("train_ppo.ppo.kl.controller")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == """\
train_ppo.ppo.kl.controller: a block of a type, fixed | adaptive; default fixed
    of the coefficient
  type: fixed
      the coefficient stays as it is
    coef: number at least 0; default 0.05
        β; 0: no KL and no reference (arXiv 2203.02155, Eq 2)
  type: adaptive
      the coefficient is steered towards a target KL (arXiv 1909.08593, section 2.2)
    coef: number above 0; default 0.05
        β, the first one
    target: number above 0; default 6.0
        [nats per response] KL to hold
    horizon: number above 0; default 10000.0
        [responses] over which the controller acts; more than a fifth of those of a phase
"""
    )


def first_line(key: str) -> str:
    """The line of a key itself, put together again where it was too long for the page."""
    (declared, *_) = found_at(key, files())
    lines = [*explained(key, declared)]
    return " ".join(lines[: next(number for number, line in enumerate(lines) if line.startswith("  "))])


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("seed", "seed: whole number at least 0 and below 4294967296; default 17"),
        # The section's own default counts, not that of any optimizer.
        ("train_rm.rm.optimizer.learning_rate", "train_rm.rm.optimizer.learning_rate: number above 0; default 0.0005"),
        ("train_ppo.ppo.kl.estimator", "train_ppo.ppo.kl.estimator: k1 | k2 | k3; default k1"),
        ("train_sft.sft.lora", "train_sft.sft.lora: null | keys; default null"),
        ("train_sft.sft.lora.targets", "train_sft.sft.lora.targets: all-linear | a list of text; default all-linear"),
        ("ref_logprobs.sft.base_quantization", "ref_logprobs.sft.base_quantization: null | nf4; default null"),
        (
            "prepare_data.kinds",
            "prepare_data.kinds: a list of sft | preference | unpaired | prompts; default "
            '["sft", "preference", "prompts"]',
        ),
        ("train_rm.rm.loss.use_margin", "train_rm.rm.loss.use_margin: true | false; default false"),
        ("runtime.default.threads", "runtime.default.threads: whole number at least 1 and at most 4096; default 2"),
        ("runtime.train_ppo.zero_stage", "runtime.train_ppo.zero_stage: 0 | 1 | 2 | 3; default 0"),
    ],
)
def test_a_key_is_told_in_a_line(key: str, line: str) -> None:
    assert first_line(key) == line


def test_a_key_of_several_types_is_told_for_each() -> None:
    assert len(found_at("train_dpo.dpo.loss.beta", files())) == 16
    assert len(found_at("train_dpo.dpo.loss.label_smoothing", files())) == 4


def test_a_block_within_a_block_of_the_same_types_is_not_told_twice() -> None:
    lines = explain("train_dpo.dpo.loss").stdout.splitlines()
    assert sum(line.strip() == "type: hinge" for line in lines) == 1
    assert lines[-1].strip() == "the loss of a pair, and what it needs"
    assert len(found_at("train_dpo.dpo.loss.parts.any.loss.beta", files())) == 16


def leaves(declared: Declared, above: str) -> set[str]:
    """The dotted names of all keys below a place, with a name of ours where any may stand."""
    if declared.entry is not None:
        return leaves(declared.entry, f"{above}any.")
    found = set()
    for block in declared.types.values() or [declared]:
        for key in block.keys:
            found |= {f"{above}{key}"} | leaves(block.below(key), f"{above}{key}.")
    return found


def test_every_key_can_be_asked_for_and_fits_the_page() -> None:
    top = files()
    keys = leaves(top, "")
    assert {f"train_sft.any.{name}" for name in TrainSft.model_fields} <= keys
    assert {f"{RUNTIME}.{stage}.{name}" for stage in ("default", *STAGES) for name in Runtime.model_fields} <= keys
    for key in keys:
        lines = [line for declared in found_at(key, top) for line in explained(key, declared)]
        assert lines[0].startswith(f"{key}: ")
        assert max(map(len, lines)) <= WIDTH, lines


def test_without_a_key_the_sections_of_both_files_are_listed() -> None:
    with_runtime = (*STAGES, *DATA_STAGES)
    lines = explain().stdout.splitlines()
    named = [line.split()[0] for line in lines if not line.startswith(" ")]
    of_runtime = [f"{RUNTIME}.{section}" for section in ("default", *with_runtime)]
    assert named == [*Params.model_fields, RUNTIME, *of_runtime]
    assert max(map(len, lines)) <= WIDTH
    assert [line.split()[0] for line in explain(RUNTIME).stdout.splitlines()] == named[-1 - len(with_runtime) :]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("train_dpo.dpo.los", "; did you mean 'train_dpo.dpo.loss'?"),
        ("train_stf.lora", "; did you mean 'train_sft'?"),
        ("runtime.trani_ppo", "; did you mean 'runtime.train_ppo'?"),
        ("seed.x", ""),
        ("..", ""),
        ("a\nb", ""),
        ("x" * 5000, ""),
    ],
)
def test_an_unknown_key_is_one_line_with_the_nearest(key: str, said: str) -> None:
    done = explain(key)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert f"is no section, block or key{said}" in done.stderr or len(key) > 1000
