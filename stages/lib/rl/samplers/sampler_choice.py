"""The sampler that an entry of params.yaml asks for, around the policy that it trains."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.compute.batching import MicroBatching, pass_cost_of, sampling_budget
from stages.lib.models.pretrained import Loading, end_and_pad_ids
from stages.lib.models.routing import routers
from stages.lib.rl.samplers.continuous import ContinuousSampler
from stages.lib.rl.samplers.own import OwnSampler
from stages.lib.rl.samplers.sampler import Sampler
from stages.lib.rl.samplers.vllm_sampler import EngineHome, VllmSampler
from stages.lib.rl.samplers.vllm_weights import VllmWeights
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.settings.sampler import TransformersSampling, VllmSampling
from stages.lib.settings.sampling import SamplingSettings


class SamplerSurroundings(NamedTuple):
    """What a sampler is made for, beside its policy and settings.

    Args:
        model: the folder that training starts from.
        seed: of our own random numbers.
        decode: from a response's ids to its text.
        first_texts: token ids of a few prompts.
        after_batch: called by all processes together, where a long phase may be left.
        home: what is kept of an engine outside; None but in the main process.
        where: the entry of params.yaml, for messages.
    """

    model: Path
    seed: int
    loading: Loading
    batching: MicroBatching
    decode: Callable[[list[int]], str]
    first_texts: Sequence[Sequence[int]]
    after_batch: Callable[[], None]
    home: EngineHome | None
    where: str


def new_sampler(policy: TrainedPolicy, settings: SamplingSettings, around: SamplerSurroundings) -> Sampler:
    """The sampler of a policy that is trained. Raises StageError where it cannot sample from such a policy."""
    chosen = settings.sampler
    if isinstance(chosen, VllmSampling):
        return vllm_sampler(policy, settings, chosen, around)
    if isinstance(chosen, TransformersSampling):
        return continuous_sampler(policy, settings, around)
    return own_sampler(policy, settings, around)


def own_sampler(policy: TrainedPolicy, settings: SamplingSettings, around: SamplerSurroundings) -> OwnSampler:
    runtime, processes = around.loading.runtime, around.batching.processes
    eos_id, pad_id = end_and_pad_ids(around.model)
    return OwnSampler(
        policy.engine,
        policy.language_model,
        around.seed,
        settings.temperature,
        settings.max_new_tokens,
        eos_id,
        pad_id,
        around.decode,
        sampling_budget(runtime),
        processes,
        after_batch=around.after_batch,
        cost=pass_cost_of(runtime, processes.device),
        min_new_tokens=settings.min_new_tokens,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_strings=settings.stop_strings,
        keeps_logps=settings.reuse_sampler_logps or settings.keeps_engine_logps,
        keeps_entropies=settings.reuse_sampler_logps,
    )


def continuous_sampler(
    policy: TrainedPolicy, settings: SamplingSettings, around: SamplerSurroundings
) -> ContinuousSampler:
    """Raises StageError where the model is shared out: its threads know nothing of other processes."""
    runtime, processes = around.loading.runtime, around.batching.processes
    if processes.world_size > 1 or runtime.zero_stage == 3:
        raise StageError(
            f"params.yaml: {around.where}.sampler: transformers' continuous batching needs a whole model in one "
            "process: start one, with zero_stage 0 to 2, or set type: own"
        )
    eos_id, pad_id = end_and_pad_ids(around.model)
    budget = sampling_budget(runtime)
    return ContinuousSampler(policy.language_model, settings, around.seed, eos_id, pad_id, around.decode, budget)


def vllm_sampler(
    policy: TrainedPolicy, settings: SamplingSettings, chosen: VllmSampling, around: SamplerSurroundings
) -> VllmSampler:
    """Raises StageError for a mixture of experts, whose routers may choose otherwise on a server than in training, and
    for batch_invariant with a server that is not the stage's to start."""
    if chosen.batch_invariant and around.loading.runtime.vllm.address is not None:
        raise StageError(
            f"params.yaml: {around.where}.sampler.batch_invariant is for a server that the stage starts, and "
            "runtime.yaml: vllm.address names one: start that with VLLM_BATCH_INVARIANT=1, and set false"
        )
    if routers(policy.language_model):
        raise StageError(
            f"params.yaml: {around.where}.sampler: a mixture of experts cannot be sampled by vLLM: its routers may "
            "choose other experts there than in training; set type: own"
        )
    model, runtime = around.model, around.loading.runtime
    precision, trusted = around.loading.precision, around.loading.trust_remote_code
    folder = around.home.weights if around.home else None
    of_server = (model, chosen, runtime.vllm, precision, around.batching, folder)
    weights = VllmWeights(policy, *of_server, trust_remote_code=trusted)
    eos_id, _ = end_and_pad_ids(model)
    of_sampler = (eos_id, around.decode, around.batching, sampling_budget(runtime), around.home)
    return VllmSampler(weights, settings, around.first_texts, *of_sampler)
