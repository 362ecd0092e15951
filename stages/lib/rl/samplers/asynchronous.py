"""Sampling one phase ahead: the responses of a phase are drawn while the phase before is still learnt from.

    phase k        takes the responses that were drawn meanwhile, hands on its own weights for phase k + 1, then learns
    responses k    come from the weights at the start of phase k − 1: they are one phase's updates old
    phase 0        draws its own

A checkpoint that is made after phase k holds the responses of phase k + 1, and waits for them; one that is made in the
midst of phase k, before its updates, those of phase k. So no response is lost or drawn twice.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from stages.lib.command.errors import StageError
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.samplers.sampler import Sampler, SamplerError
from stages.lib.rl.samplers.sampler_choice import SamplerSurroundings
from stages.lib.rl.samplers.sampling_process import SamplingProcess
from stages.lib.rl.samplers.sampling_worker import Drawn, SamplerStart
from stages.lib.rl.samplers.vllm_sampler import VllmSampler
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.settings.sampling import SamplingSettings

POLL_SECONDS = 0.5  # between two looks for a signal while responses are waited for


class Ahead(Protocol):
    """What draws beside the updates; `begin` is called by all processes together, the rest by the main one."""

    def begin(self, prompts: Sequence[Prompt], step: int, samples: int) -> None: ...

    def is_ready(self, seconds: float) -> bool: ...

    def take(self) -> list[Drawn]: ...

    def close(self) -> None: ...


class OwnAhead:
    """Our own sampler, in a process of its own; None but in the main process."""

    def __init__(self, process: SamplingProcess | None, policy: TrainedPolicy) -> None:
        self.process = process
        self.policy = policy

    def begin(self, prompts: Sequence[Prompt], step: int, samples: int) -> None:
        process, weights = self.process, trained_weights(self.policy)
        asked_for = (weights, prompts, step, samples)
        in_main(self.policy.engine.processes, lambda: process.begin(*asked_for) if process else None)

    def is_ready(self, seconds: float) -> bool:
        return self.process is None or self.process.is_ready(seconds)

    def take(self) -> list[Drawn]:
        assert self.process is not None
        return self.process.take()

    def close(self) -> None:
        if self.process is not None:
            self.process.close()


class VllmAhead:
    """A vLLM server, asked by a thread of the main process."""

    def __init__(self, sampler: VllmSampler) -> None:
        self.sampler = sampler
        self.thread: threading.Thread | None = None
        self.answer: list[Drawn] | StageError = []

    def begin(self, prompts: Sequence[Prompt], step: int, samples: int) -> None:
        self.sampler.take_weights()
        if self.sampler.home is not None:
            self.thread = threading.Thread(target=self._ask, args=(prompts, step, samples), daemon=True)
            self.thread.start()

    def _ask(self, prompts: Sequence[Prompt], step: int, samples: int) -> None:
        try:
            found = self.sampler.responses(prompts, step, samples)
            every = [
                self.sampler.episode(prompt, completion, sample)
                for prompt, completions in zip(prompts, found, strict=True)
                for sample, completion in enumerate(completions)
            ]
            self.answer = [Drawn(one.ids, one.engine_logps, None, one.ended) for one in every]
        except StageError as error:
            self.answer = error

    def is_ready(self, seconds: float) -> bool:
        if self.thread is not None:
            self.thread.join(seconds)
        return self.thread is None or not self.thread.is_alive()

    def take(self) -> list[Drawn]:
        if self.thread is not None:
            self.thread.join()
        if isinstance(self.answer, StageError):
            raise self.answer
        return self.answer

    def close(self) -> None:
        """The server ends with its sampler."""


class PhaseDrawn(NamedTuple):
    """The responses of a phase, sample by sample, and how many updates the policy had when it drew them."""

    step: int
    updates: int
    rows: list[int]  # of the prompts
    responses: list[Drawn]

    def as_state(self) -> dict[str, Any]:
        return self._asdict() | {"responses": [list(response) for response in self.responses]}


@dataclass
class AsynchronousSampler:
    """A `Sampler` whose responses are a phase old, and a part of a checkpoint.

    Args:
        inner: draws the first phase, and held-out responses.
        ahead: draws all others.
        decode: from a response's ids to its text.
        upcoming: the prompts of a phase (0-based); none after the last.
        step_of_run: the phase that is under way, or the coming one between two.
        after_batch: called by all processes together while they wait.
    """

    inner: Sampler
    ahead: Ahead
    policy: TrainedPolicy
    decode: Callable[[list[int]], str]
    upcoming: Callable[[int], Sequence[Prompt]]
    step_of_run: Callable[[], int]
    after_batch: Callable[[], None]
    processes: Processes
    current: PhaseDrawn | None = None
    coming: PhaseDrawn | None = None
    asked: PhaseDrawn | None = None  # what is being drawn, still without responses
    failed: SamplerError | None = None  # what a checkpoint met while it waited
    begun: int = 0  # updates that the policy had at the start of the current phase

    @property
    def temperature(self) -> float:
        return self.inner.temperature

    @property
    def budget(self) -> MemoryBudget:
        return self.inner.budget

    @property
    def staleness(self) -> int:
        """Updates of the policy between the weights that drew the current phase's responses and those of its start."""
        return self.policy.engine.steps_taken - self.current.updates if self.current else 0

    def take_weights(self) -> None:
        """Weights are handed on in `sample`."""

    def undisturbed(self) -> Sampler:
        """As `Sampler` says, with the policy as it is: a server that draws with older weights is waited for."""
        inner = self.inner.undisturbed()
        return AfterTheOther(inner, self) if isinstance(self.ahead, VllmAhead) else inner

    def sample(self, prompts: Sequence[Prompt], step: int, samples_per_prompt: int = 1) -> list[Episode]:
        """As `Sampler` says; and the next phase's begin to be drawn."""
        if self.asked is not None:
            while not self.processes.any(self.processes.is_main and self.ahead.is_ready(POLL_SECONDS)):
                self.after_batch()
            self.finish()
        if self.failed is not None:
            raise self.failed
        updates, rows = self.policy.engine.steps_taken, [prompt.row for prompt in prompts]
        if self.coming is None or (self.coming.step, self.coming.rows) != (step, rows):
            self.inner.take_weights()
            drawn = [
                Drawn(one.ids, one.engine_logps, one.engine_entropies, one.ended)
                for one in self.inner.sample(prompts, step, samples_per_prompt)
            ]
            self.coming = PhaseDrawn(step, updates, rows, drawn)
        self.current, self.coming, self.begun = self.coming, None, updates
        later = self.upcoming(step + 1)
        if later:
            self.ahead.begin(later, step + 1, samples_per_prompt)
            self.asked = PhaseDrawn(step + 1, updates, [prompt.row for prompt in later], [])
        else:
            self.ahead.close()
        return [
            self._episode(prompts[place // samples_per_prompt], place % samples_per_prompt, response)
            for place, response in enumerate(self.current.responses)
        ]

    def _episode(self, prompt: Prompt, sample: int, drawn: Drawn) -> Episode:
        text, mask = self.decode(drawn.ids), [True] * len(drawn.ids)
        return Episode(prompt, drawn.ids, text, drawn.ended, sample, drawn.logps, mask, drawn.entropies)

    def finish(self) -> None:
        """Wait for what is being drawn. All processes call this together. Raises SamplerError if it has failed."""
        if self.asked is None:
            return
        asked, self.asked = self.asked, None
        found = in_main(self.processes, self.ahead.take)
        self.coming = asked._replace(responses=self.processes.broadcast(found) or [])

    def state_dict(self) -> dict[str, Any]:
        if self.current is None and self.coming is None:
            return {}
        step = self.step_of_run()
        if self.current is not None and self.policy.engine.steps_taken > self.begun:
            step = max(step, self.current.step + 1)  # stopped between a phase's updates and its evaluation
        if self.asked is not None and self.asked.step == step:
            try:
                self.finish()
            except SamplerError as error:  # the updates before are to be kept: it ends the run when it samples again
                self.failed = error
        left = [phase for phase in (self.current, self.coming) if phase is not None and phase.step >= step]
        return left[0].as_state() if left else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            responses = [Drawn(*response) for response in state["responses"]]
            self.coming = PhaseDrawn(**state | {"responses": responses})


def asynchronous_sampler(
    inner: Sampler,
    policy: TrainedPolicy,
    settings: SamplingSettings,
    around: SamplerSurroundings,
    upcoming: Callable[[int], Sequence[Prompt]],
    step_of_run: Callable[[], int],
    folder: Path | None,
) -> AsynchronousSampler:
    """Around the sampler that an entry asks for.

    Args:
        folder: where weights are handed on; None but in the main process.
    """
    if isinstance(inner, VllmSampler):
        ahead: Ahead = VllmAhead(inner)
    else:
        loading = around.loading
        of_loading = (loading.precision, loading.runtime, around.seed, loading.trust_remote_code)
        start = SamplerStart(str(around.model), settings, policy.lora.settings, *of_loading)
        ahead = OwnAhead(SamplingProcess(start, folder / "policy.safetensors") if folder else None, policy)
    processes = around.batching.processes
    return AsynchronousSampler(
        inner, ahead, policy, around.decode, upcoming, step_of_run, around.after_batch, processes
    )


def state_of(sampler: Sampler) -> dict[str, AsynchronousSampler]:
    """What a checkpoint holds of a sampler, beside its budget."""
    return {"ahead": sampler} if isinstance(sampler, AsynchronousSampler) else {}


@dataclass
class AfterTheOther:
    """A sampler that shares a server with an asynchronous one, and lets that finish before it changes the weights."""

    inner: Sampler
    other: AsynchronousSampler

    @property
    def temperature(self) -> float:
        return self.inner.temperature

    @property
    def budget(self) -> MemoryBudget:
        return self.inner.budget

    def take_weights(self) -> None:
        self.other.finish()
        self.inner.take_weights()

    def undisturbed(self) -> "AfterTheOther":
        return self

    def sample(self, prompts: Sequence[Prompt], step: int, samples_per_prompt: int) -> list[Episode]:
        return self.inner.sample(prompts, step, samples_per_prompt)


def in_main(processes: Processes, action: Callable[[], Any]) -> Any:
    """As `Processes.in_main`, of an engine that samples: raises SamplerError in all processes."""
    try:
        return processes.in_main(action)
    except StageError as error:
        raise SamplerError(str(error)) from None


def trained_weights(policy: TrainedPolicy) -> Mapping[str, torch.Tensor]:
    """What training changes of the language model, by the model's own names; each tied weight once.

    All processes call this together. In the type of the model, on the CPU; none but in the main process.
    """
    names = {id(weight): name for name, weight in policy.language_model.named_parameters()}
    found = {}
    for name, weight in policy.engine.trained.items():
        if id(weight) in names:
            value = policy.engine.full_state(name).detach()
            if policy.engine.processes.is_main:
                found[names[id(weight)]] = value.to("cpu", weight.dtype).contiguous()
    return found
