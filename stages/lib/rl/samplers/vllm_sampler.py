"""Sampling with a vLLM server, which gets the policy's weights whenever they have changed, and must prove it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from stages.lib.command.errors import StageError
from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.kept_answers import KeptAnswers
from stages.lib.rl.samplers.kept_responses import KeptResponses
from stages.lib.rl.samplers.probe import policy_logps
from stages.lib.rl.samplers.sampler import SamplerError
from stages.lib.rl.samplers.vllm_connection import Completion
from stages.lib.rl.samplers.vllm_weights import VllmWeights
from stages.lib.settings.sampling import SamplingSettings

LIKELY_AS_DRAWN = 16  # tokens of each of the responses that show at which temperature log-probs are taken


class EngineHome(NamedTuple):
    """Where a run keeps what belongs to an engine outside of its own processes."""

    responses: Path  # a file
    weights: Path  # a folder, of the server's log, too
    code: str  # hash of the stage's code


@dataclass
class VllmSampler:
    """A `Sampler`; see `settings/sampler.py` for what it gives up.

    `take_weights` and `sample` are called by all processes together, `responses` by the main process alone, from any
    thread: it asks the server and nothing else.

    Args:
        weights: of the server.
        first_texts: token ids of a few texts, by which weights are verified before anything was sampled.
        decode: from a response's ids to its text.
    """

    weights: VllmWeights
    settings: SamplingSettings
    first_texts: Sequence[Sequence[int]]
    eos_id: int
    decode: Callable[[list[int]], str]
    batching: MicroBatching
    budget: MemoryBudget
    home: EngineHome | None
    taken: int = -1  # the count of the policy's changes at the last push
    updates: int = 0  # optimizer steps of the policy by then
    sampled: list[Episode] = field(default_factory=list)  # last

    @property
    def temperature(self) -> float:
        return self.settings.temperature

    def undisturbed(self) -> Self:
        """As `Sampler` says; nothing disturbs it."""
        return self

    def take_weights(self) -> None:
        """As `Sampler` says: push the weights, if they have changed, and verify that they arrived."""
        engine = self.weights.policy.engine
        if self.taken == engine.changes:
            return
        texts = [[*episode.prompt.ids, *episode.ids] for episode in self.sampled] or self.first_texts
        self.weights.push([text for text in texts if len(text) > 1])
        if self.taken < 0:
            self._check_temperature()
        self.taken, self.updates = engine.changes, engine.steps_taken

    def sample(self, prompts: Sequence[Prompt], step: int, samples_per_prompt: int = 1) -> list[Episode]:
        """As `Sampler` says."""
        processes = self.batching.processes
        try:
            found = processes.in_main(lambda: self.responses(prompts, step, samples_per_prompt))
        except StageError as error:
            raise SamplerError(str(error)) from None
        self.sampled = [
            self.episode(prompt, completion, sample)
            for prompt, completions in zip(prompts, processes.broadcast(found) or [], strict=True)
            for sample, completion in enumerate(completions)
        ]
        return self.sampled

    def responses(self, prompts: Sequence[Prompt], step: int, samples: int) -> list[list[Completion]]:
        """The samples of each prompt: those that were kept, and the server's for the others, kept as they come."""
        assert self.home is not None, "only the main process asks the server"
        kept = KeptResponses(KeptAnswers(self.home.responses), self.home.code)
        keys = kept.keys(prompts, step, samples, self.updates)
        known = kept.find(keys)
        missing = [place for place, key in enumerate(keys) if key not in known]
        size = self.weights.server.prompts_per_request
        parts = [missing[start : start + size] for start in range(0, len(missing), size)]
        before = len(known)

        def each(number: int, completions: list[Completion]) -> None:
            places = parts[number]
            if len(completions) != samples * len(places):
                raise SamplerError(f"vLLM server answers {len(completions)} responses for {samples * len(places)}")
            found = {keys[place]: completions[i * samples : (i + 1) * samples] for i, place in enumerate(places)}
            kept.add(found)
            known.update(found)

        requests = [self.request([prompts[place].ids for place in part], samples) for part in parts]
        try:
            if requests:
                self.weights.connection.complete(requests, each)
        except SamplerError as error:
            raise SamplerError(
                f"{error}. The responses to {len(known)} of {len(keys)} prompts of this phase are kept"
                + (f" ({before} were before)" if before else "")
            ) from None
        return [known[key] for key in keys]

    def request(self, prompts: Sequence[list[int]], samples: int) -> dict:
        """What the server is asked for; every option of its own is set, so that no default of a model acts."""
        settings = self.settings
        of_stops = {"stop": list(settings.stop_strings), "include_stop_str_in_output": True}
        return {
            "prompt": list(prompts),
            "n": samples,
            "max_tokens": settings.max_new_tokens,
            "min_tokens": max(0, settings.min_new_tokens - 1),  # before the one that may end it
            "temperature": settings.temperature,
            "top_k": settings.top_k or 0,
            "top_p": settings.top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": [self.eos_id],
            **(of_stops if settings.stop_strings else {}),
        }

    def episode(self, prompt: Prompt, completion: Completion, sample: int) -> Episode:
        ids, logps, ended = completion
        kept = logps if self.settings.draws_from_all else None
        return Episode(prompt, ids, self.decode(ids), ended, sample, engine_logps=kept, policy_mask=[True] * len(ids))

    def _check_temperature(self) -> None:
        """Raise SamplerError if the server takes its log-probs before the temperature."""
        if not self.settings.draws_from_all:
            return
        prompts = [list(text) for text in self.first_texts[:4]]
        request = self.request(prompts, 1) | {"max_tokens": min(LIKELY_AS_DRAWN, self.settings.max_new_tokens)}
        drawn = self.weights.asked(lambda connection: connection.completions(request))
        ids = [completion.ids for completion in drawn]
        ours = policy_logps(self.weights.policy.engine, prompts, ids, self.temperature, self.batching)
        self.weights.require_agreement(
            ours,
            [completion.logps for completion in drawn],
            f"log-probs of what it draws at temperature {self.temperature:g} are not the policy's: it must run with "
            "--logprobs-mode processed_logprobs",
        )
