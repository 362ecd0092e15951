"""Sampling beside transformers' `generate`, on a few prompts: both say the same, and the table has what it promises."""

import pytest

from benchmarks import sampling
from benchmarks.sampling import EOS, PAD, Contest, measured, random_model, random_prompts, row_of


def test_both_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MEAN_LENGTH", 4)
    contest = Contest(random_model(), random_prompts(4), 3, 8, (EOS, PAD))
    theirs, ours = measured(contest, rounds=1)
    assert theirs.responses == ours.responses
    assert len({len(ids) for ids in ours.responses}) > 2
    assert theirs.seconds > 0 < ours.seconds
    cells = row_of(contest, theirs, ours, peak=1e9).split(" | ")
    assert cells[0] == "| 3"
    assert cells[-1] == "12 of 12 |"


def test_a_prompt_counts_once() -> None:
    model, prompts = random_model(), random_prompts(2)
    responses = [[2, 3], [2, 3]]
    alone = sampling.flops_of(Contest(model, prompts, 1, 8, (EOS, PAD)), responses)
    several = sampling.flops_of(Contest(model, prompts, 8, 8, (EOS, PAD)), responses * 8)
    weights = sampling.SHAPE.body_weights
    of_prompts = 2 * weights * sum(len(prompt.ids) for prompt in prompts)
    assert of_prompts < alone < several < 8 * (alone - of_prompts) + 1.2 * of_prompts
