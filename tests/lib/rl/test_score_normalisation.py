import math

import numpy as np
import pytest
import torch

from stages.lib.rl.score_normalisation import RunningMoments, shape_scores
from stages.lib.settings.truncated import FixedScore, MissingEos, StopProperly, Truncated


def penalty(size: float) -> MissingEos:
    return MissingEos(type="missing_eos", penalty=size)


def moments_of(*batches: list[float]) -> RunningMoments:
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch))
    return moments


def test_moments_by_hand():
    # 1, 2 | 3, 4, 10: mean 4, squared deviations 9 + 4 + 1 + 0 + 36 = 50, standard deviation sqrt(50 / 4) = 3.535534
    moments = moments_of([1.0, 2.0], [3.0, 4.0, 10.0])
    assert moments.count == 5
    assert moments.mean == pytest.approx(4.0, rel=1e-12)
    assert moments.standard_deviation == pytest.approx(3.535534, abs=1e-6)


def test_the_cut_into_batches_changes_nothing_even_far_from_zero():
    # Around 1e6 a float32 sum of squares, or E[x^2] - E[x]^2 in float32, has no digit of the variance left.
    values = np.random.default_rng(0).normal(1e6, 0.5, size=60).astype(np.float32)
    for cuts in ([60], [1] * 60, [7, 0, 53], [30, 29, 1]):
        moments = RunningMoments()
        for batch in torch.tensor(values).split(cuts):
            moments.update(batch)
        assert moments.count == 60
        assert moments.mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-12)
        assert moments.standard_deviation == pytest.approx(values.astype(np.float64).std(ddof=1), rel=1e-6)


def test_restored_moments_go_on_as_the_first_would():
    first, second = moments_of([1.0, 5.0, 2.0]), RunningMoments()
    second.load_state_dict(first.state_dict())
    for moments in (first, second):
        moments.update(torch.tensor([8.0, -1.0]))
    assert first.state_dict() == second.state_dict()
    assert (second.count, second.mean) == (5, 3.0)


def test_one_score_has_no_spread_to_divide_by():
    assert RunningMoments().standard_deviation == 1.0
    assert moments_of([3.0]).standard_deviation == 1.0
    # and equal scores are divided by almost nothing, but are 0 before
    shaped = shape_scores(
        torch.full((3,), 2.0), torch.ones(3).bool(), clip=None, moments=moments_of([2.0] * 3), truncated=penalty(0.0)
    )
    assert shaped.tolist() == [0.0, 0.0, 0.0]


def test_normalise_then_clip_then_penalise():
    # mean 4, standard deviation 3.535534, as above
    # 10 -> 1.697056 -> 1.5;  -10 -> -3.959798 -> -1.5 -> -2.5;  4 -> 0 -> -1
    # Clipped first: 1.5 -> -0.707. Penalised before the clip: the second would stay at -1.5.
    shaped = shape_scores(
        torch.tensor([10.0, -10.0, 4.0]),
        torch.tensor([True, False, False]),
        clip=1.5,
        moments=moments_of([1.0, 2.0], [3.0, 4.0, 10.0]),
        truncated=penalty(1.0),
    )
    torch.testing.assert_close(shaped, torch.tensor([1.5, -2.5, -1.0]))


def test_without_clip_scores_are_only_normalised():
    shaped = shape_scores(
        torch.tensor([10.0, -10.0]),
        torch.tensor([True, True]),
        clip=None,
        moments=moments_of([1.0, 2.0], [3.0, 4.0, 10.0]),
        truncated=penalty(1.0),
    )
    torch.testing.assert_close(shaped, torch.tensor([1.697056, -3.959798]))


def test_with_nothing_asked_for_scores_stay_as_they_are():
    scores = torch.tensor([10.0, -10.0])
    ended = torch.tensor([True, False])
    assert torch.equal(shape_scores(scores, ended, clip=None, moments=None, truncated=penalty(0.0)), scores)


def test_shaping_does_not_update_the_moments():
    moments = moments_of([1.0, 2.0])
    before = moments.state_dict()
    shape_scores(torch.tensor([9.0]), torch.tensor([True]), clip=1.0, moments=moments, truncated=penalty(0.0))
    assert moments.state_dict() == before


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"clip": 0.0}, "clip"),
        ({"clip": -1.0}, "clip"),
        ({"clip": math.nan}, "clip"),
    ],
)
def test_senseless_settings_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        shape_scores(
            torch.zeros(1),
            torch.ones(1).bool(),
            **({"clip": None, "moments": None, "truncated": penalty(0.0)} | settings),
        )


@pytest.mark.parametrize(
    ("truncated", "expected"),
    [
        (penalty(0.5), [1.5, -1.5, 2.0]),
        # A fifth of -1 would be -0.2: a bad response must not gain by going on for ever.
        (StopProperly(type="stop_properly", share=0.2), [0.4, -1.0, 2.0]),
        (FixedScore(type="fixed_score", score=-3.0), [-3.0, -3.0, 2.0]),
    ],
)
def test_what_becomes_of_truncated_responses(truncated: Truncated, expected: list[float]) -> None:
    scores, ended = torch.tensor([2.0, -1.0, 2.0]), torch.tensor([False, False, True])
    torch.testing.assert_close(shape_scores(scores, ended, truncated=truncated), torch.tensor(expected))


@pytest.mark.parametrize("clip", [0.5, 1.0])
def test_the_clip_comes_before_what_becomes_of_truncated_ones(clip: float) -> None:
    shaped = shape_scores(torch.tensor([9.0]), torch.tensor([False]), clip=clip, truncated=penalty(2.0))
    assert shaped.tolist() == [clip - 2.0]
