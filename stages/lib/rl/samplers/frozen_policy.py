"""The sampler of a policy that nothing trains."""

from functools import partial
from pathlib import Path

from stages.lib.compute.batching import pass_cost_of, sampling_budget
from stages.lib.compute.frozen_model import frozen
from stages.lib.compute.processes import Processes
from stages.lib.data.chat import decode_completion, load_tokenizer
from stages.lib.models.pretrained import Loading, end_and_pad_ids, load_language_model
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.samplers.own import OwnSampler
from stages.lib.settings.sampling import DrawingSettings


def frozen_sampler(
    model: Path, settings: DrawingSettings, seed: int, loading: Loading, processes: Processes
) -> OwnSampler:
    """Samples with random numbers that belong to a prompt's row, whichever other prompts are asked."""
    language_model, tokenizer = load_language_model(model, loading), load_tokenizer(model)
    eos_id, pad_id = end_and_pad_ids(model)
    log_probs = TokenLogProbs(language_model, chunk_tokens=loading.runtime.logits_chunk_tokens)
    return OwnSampler(
        frozen(log_probs, loading.runtime, processes),
        language_model,
        seed,
        settings.temperature,
        settings.max_new_tokens,
        eos_id,
        pad_id,
        partial(decode_completion, tokenizer),
        sampling_budget(loading.runtime),
        processes,
        by_row=True,
        cost=pass_cost_of(loading.runtime, processes.device),
        min_new_tokens=settings.min_new_tokens,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_strings=settings.stop_strings,
    )
