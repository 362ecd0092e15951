"""How good a policy is on test rows, beside a reference on the same rows with the same random numbers.

On texts (kind sft) cross-entropy and perplexity. On prompts one response each: the grade of a prompt's task where it
has one, with the difference from the reference's and the win rate against it (a tie counts half), the same of each
reward of evaluate.rewards, such as the accuracy by a verifier, the KL to the reference with 95 % intervals, length, EOS
rate, distinct-n, and from several responses to each pass@k, if it is asked for; without rows of kind prompts the texts'
own prompts are answered. On pairs the accuracy of the implicit reward β log π/π_ref. Kinds that there are no rows of
are left out; where rows are of several sources, each metric but pass@k is also given for each of them.

params.yaml names the policies and the reference.

    python -m stages.evaluate --tokens data/tokens/test --metrics metrics/evaluate --samples data/samples --name ppo
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stages.lib.command.entries import EntryOption, entry_name
from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import write_json, write_jsonl
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_params, read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import require_same_tokenizer
from stages.lib.settings.declaration import plain
from stages.lib.settings.evaluate import Evaluate, PassAtK
from stages.lib.settings.prepare_data import PrepareData
from stages.lib.settings.reward_functions import reward_files
from stages.lib.settings.rewards import SUM
from stages.lib.settings.runtime import read_runtime
from stages.lib.tasks.table import grades, require_known_tasks

if not asks_for_help():
    import torch
    from transformers import PreTrainedModel

    from stages.lib.compute.batching import MicroBatching, micro_batching, sampling_budget
    from stages.lib.compute.frozen_model import frozen
    from stages.lib.compute.memory_budget import MemoryBudget
    from stages.lib.compute.processes import Processes, join_processes
    from stages.lib.compute.sequence_logprobs import all_pair_logps, all_response_logps, all_text_logps
    from stages.lib.data.chat import decode_completion, load_tokenizer
    from stages.lib.evaluation.evaluation_rows import EvaluationRows
    from stages.lib.evaluation.judged_replies import Judgements, counted, judged_metrics, judged_record, weighted_sums
    from stages.lib.evaluation.metrics import (
        Responses,
        implicit_margins,
        preference_metrics,
        response_metrics,
        sample_records,
        text_metrics,
        with_sources,
    )
    from stages.lib.evaluation.pass_at_k import pass_metrics
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, load_language_model
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.rl.episodes import Episode
    from stages.lib.rl.rewards.entry_rewards import RewardSurroundings, reward_parts
    from stages.lib.rl.rewards.mixture import Mixture
    from stages.lib.rl.samplers.own import OwnSampler
    from stages.lib.runs.partial_results import NUMBER, NUMBERS, SEVERAL_IDS, TOKEN_IDS, PartialResults

# Steps that no training uses, so evaluation draws its own random numbers; and others where it samples several times.
SAMPLING_STEP, REPEATED_STEP = 2**31 - 1, 2**31 - 2


class Policy(NamedTuple):
    """A frozen language model under evaluation."""

    path: Path
    language_model: PreTrainedModel
    call: Callable  # `TokenLogProbs` of it, sharded if runtime.yaml asks for it


@dataclass(frozen=True)
class Evaluation:
    """What responses, texts and pairs are computed with."""

    settings: Evaluate
    seed: int
    processes: Processes
    batching: MicroBatching
    sampling: MemoryBudget
    eos_id: int
    decode: Callable[[list[int]], str]
    policy: Policy
    reference: Policy  # the same object where the reference itself is evaluated
    judges: Mixture  # the rewards that judge responses; may be none


def main(tokens: PathOption, metrics: PathOption, samples: PathOption, name: EntryOption = None) -> None:
    """Evaluate a policy against the reference on the test rows in TOKENS."""
    settings = read_params("evaluate", Evaluate)
    name = entry_name(name, settings.policies, "evaluate.policies")
    paths = {"policy": Path(settings.policies[name]), "reference": Path(settings.reference)}
    seed = read_seed(settings)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("evaluate")
    processes = join_processes(runtime)
    require_same_tokenizer(paths["reference"], paths["policy"])
    kinds = read_params("prepare_data", PrepareData).kinds
    rows = EvaluationRows(tokens, kinds, settings.max_prompts, paths["reference"])
    require_known_tasks(rows.prompts, rows.where)
    own_settings = plain(settings) | {"policies": {name: settings.policies[name]}}
    declared = {"evaluate": own_settings, "seed": seed, "trust_remote_code": trust_remote_code, "kernels": kernels}
    inputs = [*dict.fromkeys(paths.values()), *rows.paths.values()]
    inputs += map(Path, reward_files(settings.rewards, "evaluate.rewards"))
    outs = {"metrics": metrics / f"{name}.json", "samples": samples / f"{name}.jsonl"}
    loading = Loading(settings.precision, runtime, processes.device, frozen=True, trust_remote_code=trust_remote_code)
    with PartialResults(f"evaluate@{name}", declared, inputs, outs, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        evaluation = load(settings, seed, loading, processes, paths)
        rows.require_fit(evaluation.policy.language_model.config, settings.max_new_tokens)
        results: dict[str, float] = {}
        records = []
        if "sft" in rows.tables:
            results |= texts(this_run, evaluation, rows)
        if rows.prompts:
            own, theirs = answers(this_run, evaluation, rows)
            judged = judgements(evaluation, rows, own)
            others = None if theirs is None else judgements(evaluation, rows, theirs)
            drawn = (settings.bootstrap_resamples, seed)
            results |= with_sources(
                lambda places: {
                    **response_metrics(own.of(places), theirs and theirs.of(places), *drawn),
                    **judged_metrics(judged, others, places, *drawn),
                },
                [prompt.source for prompt in rows.prompts],
            )
            if settings.pass_at_k:
                tries = repeated(this_run, evaluation, rows, settings.pass_at_k)
                results |= pass_metrics(tries, settings.pass_at_k.above, settings.pass_at_k.k, *drawn)
            records = sample_records(rows.prompts, own, theirs)
            for place, record in enumerate(records if settings.rewards else ()):
                record["rewards"] = judged_record(judged, place)
        if "preference" in rows.tables and evaluation.policy is not evaluation.reference:
            results |= pairs(this_run, evaluation, rows)

        def build(staged: dict[str, Path]) -> None:
            write_json(staged["metrics"], results)
            write_jsonl(staged["samples"], records)

        this_run.publish(build)
    processes.leave()


def load(settings: Evaluate, seed: int, loading: Loading, processes: Processes, paths: dict[str, Path]) -> Evaluation:
    """Load the models at `paths`: the reference, and the policy if it is another one."""
    runtime = loading.runtime
    tokenizer = load_tokenizer(paths["reference"])
    eos_id, pad_id = end_and_pad_ids(paths["reference"])

    def policy_at(path: Path) -> Policy:
        model = load_language_model(path, loading)
        log_probs = TokenLogProbs(model, chunk_tokens=runtime.logits_chunk_tokens)
        return Policy(path, model, frozen(log_probs, runtime, processes))

    reference = policy_at(paths["reference"])
    policy = reference if paths["policy"] == paths["reference"] else policy_at(paths["policy"])
    around = RewardSurroundings(paths["reference"], settings.max_new_tokens, runtime, processes)
    return Evaluation(
        settings=settings,
        seed=seed,
        processes=processes,
        batching=micro_batching(runtime, pad_id, processes, reference.language_model),
        sampling=sampling_budget(runtime),
        eos_id=eos_id,
        decode=lambda ids: decode_completion(tokenizer, ids),
        policy=policy,
        reference=reference,
        judges=Mixture(reward_parts(settings.rewards, around)),
    )


def texts(this_run: PartialResults, evaluation: Evaluation, rows: EvaluationRows) -> dict[str, float]:
    """The metrics of the policy on texts."""
    table, policy = rows.tables["sft"], evaluation.policy

    def compute(chunk: range) -> dict[str, list]:
        some = table[chunk.start : chunk.stop]
        logps = all_text_logps(policy.call, some["input_ids"], some["loss_mask"], evaluation.batching)
        return {"logps": logps, "tokens": [sum(mask) for mask in some["loss_mask"]]}

    found = this_run.keep_all("texts", len(table), {"logps": NUMBER, "tokens": NUMBER}, compute)
    return with_sources(
        lambda places: text_metrics(*([found[name][place] for place in places] for name in ("logps", "tokens"))),
        rows.sources("sft"),
    )


def answers(
    this_run: PartialResults, evaluation: Evaluation, rows: EvaluationRows
) -> tuple[Responses, Responses | None]:
    """The responses of the policy, and of the reference if it is another model."""
    own = answer(this_run, evaluation, rows, evaluation.policy)
    if evaluation.policy is evaluation.reference:
        return own, None
    return own, answer(this_run, evaluation, rows, evaluation.reference)


def answer(this_run: PartialResults, evaluation: Evaluation, rows: EvaluationRows, policy: Policy) -> Responses:
    """One model's responses to all prompts, graded by the prompts' tasks."""
    prompts = rows.prompts

    def compute(chunk: range) -> dict[str, list]:
        episodes = sampler(evaluation, policy).sample(prompts[chunk.start : chunk.stop], SAMPLING_STEP)
        own, theirs = (response_logps(evaluation, model, episodes) for model in (policy, evaluation.reference))
        kl = (own - theirs).tolist()
        for (prompt, *_), nats in zip(episodes, kl, strict=True):
            if not math.isfinite(nats):
                raise StageError(f"prompt {prompt.row}: KL {nats} of a response: a model is broken")
        ended = [int(episode.ended) for episode in episodes]
        return {"ids": [episode.ids for episode in episodes], "kl": kl, "ended": ended}

    name = "reference-responses" if policy is evaluation.reference else "policy-responses"
    columns = {"ids": TOKEN_IDS, "kl": NUMBER, "ended": NUMBER}
    found = this_run.keep_all(name, len(prompts), columns, compute)
    this_run.say(f"{this_run.stage}: {policy.path} answered {len(prompts)} prompts")
    replies = [evaluation.decode(ids) for ids in found["ids"]]
    found["ended"] = [bool(ended) for ended in found["ended"]]
    return Responses(**found, texts=replies, grades=grades(prompts, replies, rows.where))


def repeated(
    this_run: PartialResults, evaluation: Evaluation, rows: EvaluationRows, settings: PassAtK
) -> dict[str, list[list[float | None]]]:
    """What tasks and rewards say of several responses to each prompt: by measure, of each prompt's responses."""
    prompts, count = rows.prompts, settings.samples

    def compute(chunk: range) -> dict[str, list]:
        some = prompts[chunk.start : chunk.stop]
        own_sampler = sampler(evaluation, evaluation.policy, settings.temperature)
        episodes = own_sampler.sample(some, REPEATED_STEP, count)
        groups = [episodes[start : start + count] for start in range(0, len(episodes), count)]
        return {
            "ids": [[episode.ids for episode in group] for group in groups],
            "ended": [[int(episode.ended) for episode in group] for group in groups],
        }

    found = this_run.keep_all("repeated", len(prompts), {"ids": SEVERAL_IDS, "ended": NUMBERS}, compute)
    this_run.say(f"{this_run.stage}: {evaluation.policy.path} answered each prompt {count} times")
    episodes = [
        Episode(prompt, ids, evaluation.decode(ids), bool(ended), number, None, [True] * len(ids))
        for prompt, *group in zip(prompts, found["ids"], found["ended"], strict=True)
        for number, (ids, ended) in enumerate(zip(*group, strict=True))
    ]
    asked, texts = [episode.prompt for episode in episodes], [episode.text for episode in episodes]
    said = {"gold": grades(asked, texts, rows.where)}
    for name, scores in evaluation.judges.said(episodes).items():
        said[f"reward_of_{name}"] = [counted(score) for score in scores]
    starts = range(0, len(episodes), count)
    return {measure: [scores[start : start + count] for start in starts] for measure, scores in said.items()}


def judgements(evaluation: Evaluation, rows: EvaluationRows, responses: Responses) -> Judgements:
    """What each reward says of the responses to all prompts, and of several rewards their weighted sum."""
    parts = zip(rows.prompts, responses.ids, responses.texts, responses.ended, strict=True)
    episodes = [Episode(prompt, ids, text, ended, 0, None, [True] * len(ids)) for prompt, ids, text, ended in parts]
    said = evaluation.judges.said(episodes)
    return said if len(said) < 2 else said | {SUM: weighted_sums(evaluation.judges, said)}


def sampler(evaluation: Evaluation, policy: Policy, temperature: float | None = None) -> OwnSampler:
    """Its random numbers depend on the seed, the prompt's row and the sample alone; None: evaluate.temperature."""
    settings = evaluation.settings
    return OwnSampler(
        policy.call,
        policy.language_model,
        evaluation.seed,
        settings.temperature if temperature is None else temperature,
        settings.max_new_tokens,
        evaluation.eos_id,
        evaluation.batching.pad_id,
        evaluation.decode,
        evaluation.sampling,
        evaluation.processes,
        by_row=True,
        cost=evaluation.batching.cost,
        min_new_tokens=settings.min_new_tokens,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_strings=settings.stop_strings,
    )


def response_logps(evaluation: Evaluation, policy: Policy, episodes: list[Episode]) -> torch.Tensor:
    """Log-probs of whole responses at the temperature of sampling (greedy ones: at 1), in nats. Shape: (n,)."""
    prompts, responses = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]
    temperature = evaluation.settings.temperature or 1.0
    return all_response_logps(policy.call, prompts, responses, evaluation.batching, temperature)


def pairs(this_run: PartialResults, evaluation: Evaluation, rows: EvaluationRows) -> dict[str, float]:
    """The metrics of the policy's implicit reward on pairs."""
    table = rows.tables["preference"]

    def compute(chunk: range) -> dict[str, list]:
        some = table[chunk.start : chunk.stop]
        # In bf16 a log-prob depends on the batch that it is computed in: both models get the same ones.
        logps = [
            part.tolist()
            for model in (evaluation.policy, evaluation.reference)
            for part in all_pair_logps(model.call, some, evaluation.batching)
        ]
        return {"implicit": implicit_margins(*logps)}

    implicit = this_run.keep_all("pairs", len(table), {"implicit": NUMBER}, compute)["implicit"]
    return with_sources(
        lambda places: preference_metrics([implicit[place] for place in places]), rows.sources("preference")
    )


if __name__ == "__main__":
    run(main)
