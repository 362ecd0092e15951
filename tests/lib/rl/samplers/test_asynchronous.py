"""Responses drawn a phase ahead: whose they are, what a checkpoint holds of them, and that they are asked for once."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.lib.compute.processes import Processes
from stages.lib.rl.samplers.asynchronous import AsynchronousSampler, state_of
from stages.lib.rl.samplers.sampling_worker import Drawn
from tests.lib.rl.samplers.test_own import PROMPTS, prompts_of, sampler
from tests.tiny_models import CPU, tiny_llama

PHASES, SAMPLES = 3, 2


class DrawsAtOnce:
    """With the weights that there are when it is asked, as another process would."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.calls: list[Any] = []

    def begin(self, prompts: Any, step: int, samples: int) -> None:
        self.calls.append(step)
        self.drawn = [Drawn(one.ids, None, None, one.ended) for one in self.inner.sample(prompts, step, samples)]

    def is_ready(self, _seconds: float) -> bool:
        return True

    def take(self) -> list[Drawn]:
        self.calls.append("taken")
        return self.drawn

    def close(self) -> None:
        self.calls.append("closed")


class Training:
    """A policy that changes with each phase, and the sampler beside it."""

    def __init__(self) -> None:
        self.model, self.step = tiny_llama(), 0
        own = sampler(self.model, max_new_tokens=4, by_row=False)
        self.policy: Any = SimpleNamespace(engine=SimpleNamespace(steps_taken=0))
        self.ahead = DrawsAtOnce(own)
        self.sampler = AsynchronousSampler(
            own, self.ahead, self.policy, str, self.upcoming, lambda: self.step, lambda: None, Processes(0, 1, CPU)
        )

    def upcoming(self, phase: int) -> Any:
        return prompts_of(PROMPTS, [10 * phase + place for place in range(4)]) if phase < PHASES else []

    def drawn(self) -> list[list[int]]:
        return [episode.ids for episode in self.sampler.sample(self.upcoming(self.step), self.step, SAMPLES)]

    def learn(self) -> None:
        torch.manual_seed(self.step)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight += 0.3 * torch.randn_like(weight)
        self.policy.engine.steps_taken += 5
        self.step += 1

    def by_the_policy_as_it_is(self, phase: int) -> list[list[int]]:
        return [episode.ids for episode in self.ahead.inner.sample(self.upcoming(phase), phase, SAMPLES)]


def test_a_phase_has_the_responses_of_the_weights_of_the_one_before() -> None:
    run = Training()
    wanted, staleness = run.by_the_policy_as_it_is(0), []
    for phase in range(PHASES):
        following = run.by_the_policy_as_it_is(phase + 1) if phase + 1 < PHASES else []
        assert run.drawn() == wanted
        staleness.append(run.sampler.staleness)
        run.learn()
        wanted = following
    assert staleness == [0, 5, 5]
    assert run.ahead.calls == [1, "taken", 2, "taken", "closed"]
    assert run.sampler.state_dict() == {}


def test_a_phase_that_is_stopped_between_its_updates_and_its_evaluation_is_not_drawn_again() -> None:
    whole, cut, resumed = Training(), Training(), Training()
    for run in (whole, cut):
        run.drawn()
        run.learn()
    cut.step = 0
    state = cut.sampler.state_dict()
    assert state["step"] == 1
    resumed.sampler.load_state_dict(state)
    assert resumed.sampler.state_dict() == state
    resumed.learn()
    assert resumed.drawn() == whole.drawn()


@pytest.mark.parametrize("in_the_midst", [False, True])
def test_a_checkpoint_holds_the_responses_of_the_phase_that_comes(in_the_midst: bool) -> None:
    """In the midst of a phase, before its updates, that is this one. The next one's are then drawn again."""
    whole, cut = Training(), Training()
    assert cut.sampler.state_dict() == {}
    for run in (whole, cut):
        run.drawn()
        run.learn()
    second = whole.drawn()
    if in_the_midst:
        assert cut.drawn() == second
    (name, part), *others = state_of(cut.sampler).items()
    assert (name, others) == ("ahead", [])
    state = part.state_dict()
    assert (state["step"], state["updates"]) == (1, 0)
    resumed = Training()
    resumed.sampler.load_state_dict(state)
    resumed.learn()  # to where the policy was
    assert resumed.sampler.state_dict() == state  # stopped once more before anything has happened
    assert resumed.drawn() == second
    assert (resumed.sampler.staleness, resumed.ahead.calls) == (5, [2])
    for run in (whole, resumed):
        run.learn()
    assert resumed.drawn() == whole.drawn()


def test_responses_to_other_prompts_are_not_taken() -> None:
    run = Training()
    run.drawn()
    run.learn()
    other = prompts_of(PROMPTS[::-1], [90, 91, 92, 93])
    wanted = [episode.ids for episode in run.ahead.inner.sample(other, 1, SAMPLES)]
    assert [episode.ids for episode in run.sampler.sample(other, 1, SAMPLES)] == wanted
    assert run.sampler.staleness == 0
