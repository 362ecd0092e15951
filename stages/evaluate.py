"""How good a policy is on held-out prompts, beside the SFT policy on the same prompts with the same random numbers.

Reward, the grade of a prompt's task where it has one, win rates against SFT (a tie counts half) and the KL to SFT with
95 % intervals, length, EOS rate, distinct-n; and on held-out pairs the accuracy of the implicit reward β log π/π_SFT
and the reward model's accuracy and calibration.

    python -m stages.evaluate --policy models/ppo --sft models/sft --reward-model models/rm \\
        --prompt-tokens data/tokens/prompts/eval.arrow --preference-tokens data/tokens/preference/eval.arrow \\
        --ref-logprobs data/ref_logprobs/eval.arrow \\
        --metrics metrics/evaluate/ppo.json --samples data/samples/ppo.jsonl
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import write_json, write_jsonl
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_params, read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.data.prompts import Prompt, prompts_of
from stages.lib.models.model_facts import read_model_facts
from stages.lib.models.tokenizer_files import require_same_tokenizer, require_tokens_of
from stages.lib.settings.evaluate import Evaluate
from stages.lib.settings.runtime import read_runtime
from stages.lib.tasks.table import grades, require_known_tasks

if not asks_for_help():
    import torch
    from transformers import PreTrainedModel

    from stages.lib.compute.batching import MicroBatching, micro_batching, sampling_budget
    from stages.lib.compute.frozen_model import frozen
    from stages.lib.compute.memory_budget import MemoryBudget
    from stages.lib.compute.processes import Processes, join_processes
    from stages.lib.compute.sequence_logprobs import all_pair_logps, all_response_logps
    from stages.lib.compute.sequence_scores import all_pair_scores, all_scores
    from stages.lib.data.chat import decode_completion, load_tokenizer
    from stages.lib.data.reference_tables import LOG_PROBS, read_reference, require_made_from
    from stages.lib.data.token_tables import (
        PREFERENCE_SCHEMA,
        PROMPT_SCHEMA,
        check_table_fits,
        read_note,
        read_table,
    )
    from stages.lib.evaluation.metrics import (
        Responses,
        implicit_margins,
        pair_metrics,
        response_metrics,
        sample_records,
    )
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, load_classifier, load_language_model
    from stages.lib.models.scalar_scores import SequenceScores
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.objectives.reference_start import require_start
    from stages.lib.rl.episodes import Episode
    from stages.lib.rl.samplers.own import OwnSampler
    from stages.lib.rl.sampling import require_room
    from stages.lib.runs.partial_results import NUMBER, TOKEN_IDS, PartialResults

CHECKED_PAIRS = 32  # whose cached reference log-probs are computed again, to see whether they are what they claim
SAMPLING_STEP = 2**31 - 1  # a step that no training uses, so evaluation draws its own random numbers


class HeldOut:
    """The prompts and pairs of an evaluation.

    Raises:
        StageError: the reference is of other pairs, a prompt's facts name an unknown task, a table is damaged.
    """

    def __init__(self, prompts: Path, pairs: Path, reference: Path, max_prompts: int | None) -> None:
        self.prompts_path, self.pairs_path, self.reference_path = prompts, pairs, reference
        self.all_prompts = read_table(prompts, PROMPT_SCHEMA)
        self.prompts = prompts_of(self.all_prompts[:max_prompts])
        require_known_tasks(self.prompts, str(prompts))
        self.pairs = read_table(pairs, PREFERENCE_SCHEMA)
        self.reference = read_reference(reference, self.pairs, pairs)

    def require_reference_of(self, sft: Path, hashes: dict[str, str]) -> None:
        """Raise StageError if the reference is of other tokens or another model than `sft`.

        Args:
            hashes: of all inputs, by path.
        """
        tokens, model = ((path, hashes[str(path)]) for path in (self.pairs_path, sft))
        require_made_from(self.reference_path, tokens=tokens, model=model)

    def has_reference_in(self, precision: str) -> bool:
        """Whether the cached log-probs are of models as the evaluation loads them: in `precision`, not quantised."""
        notes = {note: read_note(self.reference_path, note) for note in ("precision", "base_quantization")}
        return notes == {"precision": precision, "base_quantization": "None"}

    def require_fit(self, config: Any, max_new_tokens: int) -> None:
        """Raise StageError if the model has no such token, or no room for a prompt with its response."""
        facts = read_model_facts(config.to_dict())
        check_table_fits(self.all_prompts, facts, self.prompts_path)
        check_table_fits(self.pairs, facts, self.pairs_path)
        where = f"{self.prompts_path} with evaluate.max_new_tokens"
        require_room([prompt.ids for prompt in self.prompts], config, max_new_tokens, where)


class Policy(NamedTuple):
    """A frozen language model under evaluation."""

    path: Path
    language_model: PreTrainedModel
    call: Callable  # `TokenLogProbs` of it, sharded if runtime.yaml asks for it


@dataclass(frozen=True)
class Evaluation:
    """What responses and pairs are computed with."""

    settings: Evaluate
    seed: int
    processes: Processes
    batching: MicroBatching
    sampling: MemoryBudget
    eos_id: int
    decode: Callable[[list[int]], str]
    policy: Policy
    sft: Policy  # the same object where SFT itself is evaluated
    scorer: Callable


def main(
    policy: PathOption,
    sft: PathOption,
    reward_model: PathOption,
    prompt_tokens: PathOption,
    preference_tokens: PathOption,
    ref_logprobs: PathOption,
    metrics: PathOption,
    samples: PathOption,
) -> None:
    """Evaluate POLICY against SFT on held-out prompts and pairs."""
    settings = read_params("evaluate", Evaluate)
    seed = read_seed(settings)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("evaluate")
    processes = join_processes(runtime)
    require_same_tokenizer(sft, policy)
    require_same_tokenizer(sft, reward_model)
    for table in (prompt_tokens, preference_tokens):
        require_tokens_of(table, sft)
    held_out = HeldOut(prompt_tokens, preference_tokens, ref_logprobs, settings.max_prompts)
    declared = {"evaluate": settings, "seed": seed, "trust_remote_code": trust_remote_code, "kernels": kernels}
    inputs = [policy, sft, reward_model, prompt_tokens, preference_tokens, ref_logprobs]
    outs = {"metrics": metrics, "samples": samples}
    loading = Loading(settings.precision, runtime, processes.device, frozen=True, trust_remote_code=trust_remote_code)
    with PartialResults(
        "evaluate", declared, inputs, outs, runtime, processes, logged_as=f"evaluate@{policy.name}"
    ) as this_run:
        if this_run.already_complete():
            return
        processes.in_main(lambda: held_out.require_reference_of(sft, this_run.own_scratch.input_hashes))
        evaluation = load(settings, seed, loading, processes, {"policy": policy, "sft": sft, "reward": reward_model})
        held_out.require_fit(evaluation.policy.language_model.config, settings.max_new_tokens)
        theirs = answer(this_run, evaluation, held_out, evaluation.sft)
        own = theirs if policy == sft else answer(this_run, evaluation, held_out, evaluation.policy)
        results = response_metrics(own, theirs, settings.bootstrap_resamples, seed)
        results |= pair_metrics(**judge_pairs(this_run, evaluation, held_out))

        def build(staged: dict[str, Path]) -> None:
            write_json(staged["metrics"], results)
            write_jsonl(staged["samples"], sample_records(held_out.prompts, own, theirs))

        this_run.publish(build)
    processes.leave()


def load(settings: Evaluate, seed: int, loading: Loading, processes: Processes, paths: dict[str, Path]) -> Evaluation:
    """Load the models at `paths`: policy, sft (once, if it is the policy) and reward."""
    runtime = loading.runtime
    tokenizer = load_tokenizer(paths["sft"])
    eos_id, pad_id = end_and_pad_ids(paths["sft"])

    def policy_at(path: Path) -> Policy:
        model = load_language_model(path, loading)
        log_probs = TokenLogProbs(model, chunk_tokens=runtime.logits_chunk_tokens)
        return Policy(path, model, frozen(log_probs, runtime, processes))

    sft = policy_at(paths["sft"])
    policy = sft if paths["policy"] == paths["sft"] else policy_at(paths["policy"])
    return Evaluation(
        settings=settings,
        seed=seed,
        processes=processes,
        batching=micro_batching(runtime, pad_id, processes),
        sampling=sampling_budget(runtime),
        eos_id=eos_id,
        decode=lambda ids: decode_completion(tokenizer, ids),
        policy=policy,
        sft=sft,
        scorer=frozen(SequenceScores(load_classifier(paths["reward"], loading)), runtime, processes),
    )


def answer(this_run: PartialResults, evaluation: Evaluation, held_out: HeldOut, policy: Policy) -> Responses:
    """One policy's responses to all prompts, scored by the reward model and graded by the prompts' tasks."""
    prompts = held_out.prompts

    def compute(chunk: range) -> dict[str, list]:
        episodes = sample(evaluation, policy, prompts[chunk.start : chunk.stop])
        rewards = score(evaluation, episodes)
        own, sfts = (response_logps(evaluation, model, episodes) for model in (policy, evaluation.sft))
        kl = (own - sfts).tolist()
        for (prompt, *_), reward, nats in zip(episodes, rewards, kl, strict=True):
            if not (math.isfinite(reward) and math.isfinite(nats)):
                raise StageError(f"prompt {prompt.row}: reward {reward} and KL {nats} of a response: a model is broken")
        return {"ids": [episode.ids for episode in episodes], "rewards": rewards, "kl": kl}

    name = "sft-responses" if policy is evaluation.sft else "policy-responses"
    columns = {"ids": TOKEN_IDS, "rewards": NUMBER, "kl": NUMBER}
    answers = this_run.keep_all(name, len(prompts), columns, compute)
    this_run.say(f"{this_run.logged_as}: {policy.path} answered {len(prompts)} prompts")
    texts = [evaluation.decode(ids) for ids in answers["ids"]]
    ended = [ids[-1] == evaluation.eos_id for ids in answers["ids"]]
    return Responses(**answers, texts=texts, ended=ended, grades=grades(prompts, texts, str(held_out.prompts_path)))


def sample(evaluation: Evaluation, policy: Policy, prompts: list[Prompt]) -> list[Episode]:
    """One response to each prompt; the random numbers depend on the seed and the prompt's row alone."""
    sampler = OwnSampler(
        policy.call,
        policy.language_model,
        evaluation.seed,
        evaluation.settings.temperature,
        evaluation.settings.max_new_tokens,
        evaluation.eos_id,
        evaluation.batching.pad_id,
        evaluation.decode,
        evaluation.sampling,
        evaluation.processes,
        by_row=True,
    )
    return sampler.sample(prompts, SAMPLING_STEP)


def score(evaluation: Evaluation, episodes: list[Episode]) -> list[float]:
    """The reward model's score of each response."""
    prompts, responses = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]
    return all_scores(evaluation.scorer, prompts, responses, evaluation.batching)


def response_logps(evaluation: Evaluation, policy: Policy, episodes: list[Episode]) -> torch.Tensor:
    """Log-probs of whole responses at the temperature of sampling (greedy ones: at 1), in nats. Shape: (n,)."""
    prompts, responses = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]
    temperature = evaluation.settings.temperature or 1.0
    return all_response_logps(policy.call, prompts, responses, evaluation.batching, temperature)


def judge_pairs(this_run: PartialResults, evaluation: Evaluation, held_out: HeldOut) -> dict[str, list]:
    """The reward model's scores of all `chosen` and `rejected` replies, and the policy's `implicit` margins."""
    precision = evaluation.settings.precision
    made_so = held_out.has_reference_in(precision)
    if not made_so:
        this_run.say(
            "evaluate: the cached reference log-probs were made in another precision or quantised; computing them again"
        )
    # In bf16 a log-prob depends on the batch that it is computed in: both models get the same ones.
    cached = made_so and precision == "fp32"
    policy, sft, batching = evaluation.policy, evaluation.sft, evaluation.batching

    def compute(chunk: range) -> dict[str, list]:
        pairs, reference = (table[chunk.start : chunk.stop] for table in (held_out.pairs, held_out.reference))
        if cached and chunk.start == 0:
            first = {**held_out.pairs[:CHECKED_PAIRS], **held_out.reference[:CHECKED_PAIRS]}
            require_start(sft.call, first, batching, held_out.reference_path, precision)
        scores = all_pair_scores(evaluation.scorer, pairs, batching)
        own = lists(all_pair_logps(policy.call, pairs, batching))
        sfts = [reference[name] for name in LOG_PROBS] if cached else lists(all_pair_logps(sft.call, pairs, batching))
        return {**scores._asdict(), "implicit": implicit_margins(*own, *sfts)}

    columns = {"chosen": NUMBER, "rejected": NUMBER, "implicit": NUMBER}
    return this_run.keep_all("pairs", len(held_out.pairs), columns, compute)


def lists(tensors: Iterable[torch.Tensor]) -> list[list[float]]:
    return [tensor.tolist() for tensor in tensors]


if __name__ == "__main__":
    run(main)
