"""How good a policy is on held-out prompts, beside the SFT policy on the same prompts with the same random numbers.

Reward, gold utility where the prompts have one, win rates against SFT (a tie counts half) and the KL to
SFT with 95 % intervals, length, EOS rate, distinct-n; and on held-out pairs the accuracy of the implicit reward
β log π/π_SFT and the reward model's accuracy and calibration.

    python -m stages.evaluate --policy models/ppo --sft models/sft --reward-model models/rm \\
        --prompts data/prepared/prompts/eval.jsonl --prompt-tokens data/tokens/prompts/eval.arrow \\
        --preference-tokens data/tokens/preference/eval.arrow --ref-logprobs data/ref_logprobs/eval.arrow \\
        --metrics metrics/evaluate/ppo.json --samples data/samples/ppo.jsonl
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import read_jsonl, write_json, write_jsonl
from stages.lib.command.params import read_params, read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.evaluation.intervals import calibration_error, distinct_n, paired_bootstrap_interval, wilson_interval
from stages.lib.models.model_facts import read_model_facts
from stages.lib.models.tokenizer_files import require_same_tokenizer, require_tokens_of
from stages.lib.settings.evaluate import Evaluate
from stages.lib.settings.runtime import Runtime, read_runtime
from stages.lib.tasks.film_gold import gold_utility

if not asks_for_help():
    import torch

    from stages.lib.compute.batching import micro_batching, sampling_budget
    from stages.lib.compute.frozen_model import frozen
    from stages.lib.compute.processes import Processes, join_processes
    from stages.lib.compute.sequence_logprobs import all_pair_logps
    from stages.lib.data.token_tables import (
        PREFERENCE_SCHEMA,
        PROMPT_SCHEMA,
        check_table_fits,
        read_note,
        read_table,
    )
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, load_classifier, load_language_model
    from stages.lib.models.scalar_scores import SequenceScores
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.objectives.reference_logprobs import read_reference, require_made_from, require_start
    from stages.lib.rl.sampling import require_room, sample_responses
    from stages.lib.runs.partial_results import NUMBER, TOKEN_IDS, PartialResults

CHECKED_PAIRS = 32  # whose cached reference log-probs are computed again, to see whether they are what they claim
SAMPLING_STEP = 2**31 - 1  # a step that no training uses, so evaluation draws its own random numbers


@dataclass
class Responses:
    """One policy's responses to the held-out prompts, in their order."""

    ids: list[list[int]]
    texts: list[str]
    rewards: list[float]
    kl: list[float]  # to SFT, summed over the response, in nats; estimate k1
    gold: list[float] | None


class HeldOut:
    """The prompts and pairs of an evaluation.

    Raises:
        StageError: the files were not made from each other.
    """

    def __init__(
        self, prompts: Path, prompt_tokens: Path, preference_tokens: Path, ref_logprobs: Path, max_prompts: int | None
    ) -> None:
        self.prompt_tokens, self.preference_tokens, self.path = prompt_tokens, preference_tokens, ref_logprobs
        self.prompt_rows = prompts
        self.prompts = read_table(prompt_tokens, PROMPT_SCHEMA)[:max_prompts]
        self.pairs = read_table(preference_tokens, PREFERENCE_SCHEMA)
        self.reference = read_reference(ref_logprobs, self.pairs, preference_tokens)
        self.reference_made_as = {note: read_note(ref_logprobs, note) for note in ("precision", "base_quantization")}
        prepared = dict(enumerate(read_jsonl(prompts)))
        if not set(self.prompts["row"]) <= prepared.keys():
            raise StageError(
                f"{prompt_tokens} was made from other rows than {prompts}; run the stage tokenize_data again"
            )
        self.rows = [prepared[row] for row in self.prompts["row"]]

    def require_made_from_each_other(self, sft: Path, hashes: dict[str, str]) -> None:
        """Raise StageError if tokens are of other prompts, or the reference of other tokens or another model.

        Args:
            hashes: of all inputs, by path.
        """
        tokens, model = ((path, hashes[str(path)]) for path in (self.preference_tokens, sft))
        require_made_from(self.path, tokens=tokens, model=model)
        if read_note(self.prompt_tokens, "rows") != hashes[str(self.prompt_rows)]:
            raise StageError(
                f"{self.prompt_tokens} was made from other rows than {self.prompt_rows}; "
                "run the stage tokenize_data again"
            )

    def has_reference_in(self, precision: str) -> bool:
        """Whether the cached log-probs are of models as the evaluation loads them: in `precision`, not quantised."""
        return self.reference_made_as == {"precision": precision, "base_quantization": "None"}

    def require_fit(self, config: Any, max_new_tokens: int) -> None:
        """Raise StageError if the model has no such token, or no room for a prompt with its response."""
        facts = read_model_facts(config.to_dict())
        check_table_fits(read_table(self.prompt_tokens, PROMPT_SCHEMA), facts, self.prompt_tokens)
        check_table_fits(self.pairs, facts, self.preference_tokens)
        where = f"{self.prompt_tokens} with evaluate.max_new_tokens"
        require_room(self.prompts["prompt_ids"], config, max_new_tokens, where)


@dataclass
class Policy:
    """A frozen language model under evaluation."""

    log_probs: TokenLogProbs
    call: Callable  # `log_probs`, sharded if runtime.yaml asks for it
    config: Any

    @contextmanager
    def at(self, temperature: float) -> Iterator[None]:
        """Log-probs of logits divided by `temperature`."""
        self.log_probs.temperature = temperature
        yield
        self.log_probs.temperature = 1.0


class Evaluation:
    """The models of an evaluation and what is asked of them."""

    def __init__(
        self,
        settings: Evaluate,
        seed: int,
        runtime: Runtime,
        processes: Processes,
        sft: Path,
        *,
        trust_remote_code: bool,
    ) -> None:
        self.settings, self.seed, self.runtime, self.processes = settings, seed, runtime, processes
        self.loading = Loading(
            settings.precision, runtime, processes.device, frozen=True, trust_remote_code=trust_remote_code
        )
        self.eos_id, self.pad_id = end_and_pad_ids(sft)
        self.batching = micro_batching(runtime, self.pad_id, processes)
        self.sampling = sampling_budget(runtime)

    def load_policy(self, path: Path) -> Policy:
        model = load_language_model(path, self.loading)
        module = TokenLogProbs(model, chunk_tokens=self.runtime.logits_chunk_tokens)
        return Policy(module, frozen(module, self.runtime, self.processes), model.config)

    def load_reward_model(self, path: Path) -> Callable:
        classifier = load_classifier(path, self.loading)
        return frozen(SequenceScores(classifier), self.runtime, self.processes)

    def sample(self, policy: Policy, prompts: list[list[int]], rows: list[int]) -> list[list[int]]:
        """One response to each prompt; the random numbers depend on the seed and the prompt's row alone."""
        return self.sampling.attempt(
            lambda: sample_responses(
                policy.call,
                prompts,
                rows,
                config=policy.config,
                seed=self.seed,
                step=SAMPLING_STEP,
                temperature=self.settings.temperature,
                max_new_tokens=self.settings.max_new_tokens,
                eos_id=self.eos_id,
                pad_id=self.pad_id,
                batch_size=self.sampling.size,
                processes=self.processes,
            )
        )

    def judge(
        self, prompts: list[list[int]], responses: list[list[int]], policy: Policy, sft: Policy, scorer: Callable
    ) -> tuple[list[float], list[float]]:
        """(rewards, KL to SFT) of each response."""

        def passes() -> dict[int, tuple[float, float]]:
            found = {}
            for batch in self.batching.sequences(prompts, responses):
                scores = scorer(*batch.inputs, batch.end_mask).tolist()
                logps, sft_logps = (
                    batch.on_completions(model.call(*batch.inputs, batch.completion_mask)[0]).sum(dim=-1)
                    for model in (policy, sft)
                )
                found |= dict(zip(batch.rows, zip(scores, (logps - sft_logps).tolist(), strict=True), strict=True))
            return found

        temperature = self.settings.temperature or 1.0
        with policy.at(temperature), sft.at(temperature):
            found = self.batching.budget.attempt(passes)
        rewards, kl = (list(column) for column in zip(*self.processes.gather_rows(found), strict=True))
        return rewards, kl

    def pair_rewards(self, scorer: Callable, pairs: dict[str, list]) -> list[tuple[float, float]]:
        """The reward model's scores of the chosen and of the rejected reply of each pair."""

        def passes() -> dict[int, tuple[float, float]]:
            found = {}
            for batch in self.batching.pairs(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"]):
                chosen, rejected = scorer(*batch.inputs, batch.end_mask).tensor_split(2)
                found |= dict(zip(batch.rows, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
            return found

        return self.processes.gather_rows(self.batching.budget.attempt(passes))

    def implicit_margins(
        self, policy: Policy, sft: Policy, pairs: dict[str, list], reference: dict[str, list] | None
    ) -> list[float]:
        """log π/π_SFT of the chosen reply minus that of the rejected one, for each pair.

        The log-probs of `sft` are those of `reference`, or else computed.
        """
        chosen, rejected = (part.tolist() for part in all_pair_logps(policy.call, pairs, self.batching))
        if reference is None:
            references = zip(*(part.tolist() for part in all_pair_logps(sft.call, pairs, self.batching)), strict=True)
        else:
            references = zip(reference["reference_chosen_logps"], reference["reference_rejected_logps"], strict=True)
        return [c - r - (rc - rr) for c, r, (rc, rr) in zip(chosen, rejected, references, strict=True)]


def main(
    policy: PathOption,
    sft: PathOption,
    reward_model: PathOption,
    prompts: PathOption,
    prompt_tokens: PathOption,
    preference_tokens: PathOption,
    ref_logprobs: PathOption,
    metrics: PathOption,
    samples: PathOption,
) -> None:
    """Evaluate POLICY against SFT on held-out prompts and pairs."""
    settings = read_params("evaluate", Evaluate)
    seed = read_seed(settings)
    trust_remote_code = read_value("trust_remote_code", bool)
    runtime = read_runtime("evaluate")
    processes = join_processes(runtime)
    require_same_tokenizer(sft, policy)
    require_same_tokenizer(sft, reward_model)
    for table in (prompt_tokens, preference_tokens):
        require_tokens_of(table, sft)
    held_out = HeldOut(prompts, prompt_tokens, preference_tokens, ref_logprobs, settings.max_prompts)
    declared = {"evaluate": settings, "seed": seed, "trust_remote_code": trust_remote_code}
    inputs = [policy, sft, reward_model, prompts, prompt_tokens, preference_tokens, ref_logprobs]
    outs = {"metrics": metrics, "samples": samples}
    logged_as = f"evaluate@{policy.name}"
    with PartialResults("evaluate", declared, inputs, outs, runtime, processes, logged_as) as this_run:
        if this_run.already_complete():
            return
        processes.in_main(lambda: held_out.require_made_from_each_other(sft, this_run.scratch.input_hashes))
        evaluation = Evaluation(settings, seed, runtime, processes, sft, trust_remote_code=trust_remote_code)
        models = {path: evaluation.load_policy(path) for path in dict.fromkeys((sft, policy))}
        held_out.require_fit(models[policy].config, settings.max_new_tokens)
        scorer = evaluation.load_reward_model(reward_model)
        decode = reply_decoder(sft)
        judged = {}
        for name, path in {"sft": sft, "policy": policy}.items():
            if path in judged:
                continue
            answers = answer_and_judge(this_run, evaluation, name, held_out.prompts, models[path], models[sft], scorer)
            texts = [decode(response) for response in answers["ids"]]
            judged[path] = Responses(**answers, texts=texts, gold=gold_of(held_out.rows, texts))
            this_run.say(f"evaluate {policy.name}: {path} answered {len(texts)} prompts")
        results = compare(judged[policy], judged[sft], evaluation.eos_id, settings, seed)
        results |= preference_results(this_run, evaluation, models[policy], models[sft], scorer, held_out)

        def build(staged: dict[str, Path]) -> None:
            write_json(staged["metrics"], results)
            write_jsonl(staged["samples"], sample_rows(held_out, judged[policy], judged[sft], evaluation.eos_id))

        this_run.publish(build)
    processes.leave()


def answer_and_judge(
    this_run: PartialResults,
    evaluation: Evaluation,
    name: str,
    prompts: dict[str, list],
    policy: Policy,
    sft: Policy,
    scorer: Callable,
) -> dict[str, list]:
    """`ids`, `rewards` and `kl` of one policy's responses to all prompts."""

    def compute(prompt_ids: list[list[int]], rows: list[int]) -> dict[str, list]:
        ids = evaluation.sample(policy, prompt_ids, rows)
        rewards, kl = evaluation.judge(prompt_ids, ids, policy, sft, scorer)
        for row, reward, divergence in zip(rows, rewards, kl, strict=True):
            if not (math.isfinite(reward) and math.isfinite(divergence)):
                raise StageError(f"prompt {row}: reward {reward} and KL {divergence} of a response: a model is broken")
        return {"ids": ids, "rewards": rewards, "kl": kl}

    columns = {"ids": TOKEN_IDS, "rewards": NUMBER, "kl": NUMBER}
    return joined(
        this_run.keep(
            f"{name}-responses-{chunk.start}-{chunk.stop}",
            len(chunk),
            columns,
            partial(compute, prompts["prompt_ids"][chunk.start : chunk.stop], prompts["row"][chunk.start : chunk.stop]),
        )
        for chunk in this_run.chunks(len(prompts["row"]))
    )


def judge_pairs(
    this_run: PartialResults, evaluation: Evaluation, policy: Policy, sft: Policy, scorer: Callable, held_out: HeldOut
) -> dict[str, list]:
    """The reward model's scores of all `chosen` and `rejected` replies, and the policy's `implicit` margins."""
    precision = evaluation.settings.precision
    made_so = held_out.has_reference_in(precision)
    if not made_so:
        this_run.say(
            "evaluate: the cached reference log-probs were made in another precision or quantised; computing them again"
        )
    # In bf16 a log-prob depends on the batch that it is computed in: both models get the same ones.
    cached = made_so and precision == "fp32"

    def compute(chunk: range) -> dict[str, list]:
        own_pairs, own_reference = (table[chunk.start : chunk.stop] for table in (held_out.pairs, held_out.reference))
        if cached and chunk.start == 0:
            first = {**held_out.pairs[:CHECKED_PAIRS], **held_out.reference[:CHECKED_PAIRS]}
            require_start(sft.call, first, evaluation.batching, held_out.path, precision)
        both = evaluation.pair_rewards(scorer, own_pairs)
        implicit = evaluation.implicit_margins(policy, sft, own_pairs, own_reference if cached else None)
        return {
            "chosen": [chosen for chosen, _ in both],
            "rejected": [rejected for _, rejected in both],
            "implicit": implicit,
        }

    columns = {"chosen": NUMBER, "rejected": NUMBER, "implicit": NUMBER}
    return joined(
        this_run.keep(f"pairs-{chunk.start}-{chunk.stop}", len(chunk), columns, partial(compute, chunk))
        for chunk in this_run.chunks(len(held_out.pairs))
    )


def joined(parts: Iterable[dict[str, list]]) -> dict[str, list]:
    """The columns of all parts, one after the other."""
    columns: dict[str, list] = {}
    for part in parts:
        for name, values in part.items():
            columns.setdefault(name, []).extend(values)
    return columns


def reply_decoder(model: Path) -> Any:
    from stages.lib.data.chat import decode_completion, load_tokenizer

    tokenizer = load_tokenizer(model)
    return lambda ids: decode_completion(tokenizer, ids)


def gold_of(rows: list[dict[str, Any]], texts: list[str]) -> list[float] | None:
    """Gold utility of each response, or None where the prompts have none."""
    if not all("gold" in row for row in rows):
        return None
    return [gold_utility(row["gold"], text) for row, text in zip(rows, texts, strict=True)]


def compare(policy: Responses, sft: Responses, eos_id: int, settings: Evaluate, seed: int) -> dict[str, float]:
    """Everything that is measured on responses."""
    count = len(policy.ids)
    results: dict[str, float] = {"prompts": count}
    measured = [("reward", policy.rewards, sft.rewards)]
    if policy.gold is not None and sft.gold is not None:
        measured.append(("gold", policy.gold, sft.gold))
    for name, own, theirs in measured:
        results |= against_sft(name, own, theirs, settings.bootstrap_resamples, seed)
    kl_low, kl_high = paired_bootstrap_interval(policy.kl, seed, settings.bootstrap_resamples)
    return results | {
        "kl_to_sft_mean": sum(policy.kl) / count,
        "kl_to_sft_ci_low": kl_low,
        "kl_to_sft_ci_high": kl_high,
        "eos_rate": sum(response[-1] == eos_id for response in policy.ids) / count,
        "length_mean": sum(len(response) for response in policy.ids) / count,
        "distinct_1": distinct_n(policy.ids, 1),
        "distinct_2": distinct_n(policy.ids, 2),
    }


def against_sft(name: str, own: list[float], theirs: list[float], resamples: int, seed: int) -> dict[str, float]:
    """Mean, paired difference to SFT and win rate (a tie counts half), each with its 95 % interval."""
    count = len(own)
    differences = [ours - sfts for ours, sfts in zip(own, theirs, strict=True)]
    low, high = paired_bootstrap_interval(differences, seed, resamples)
    wins = sum(1.0 if difference > 0 else 0.5 if difference == 0 else 0.0 for difference in differences)
    win_low, win_high = wilson_interval(wins, count)
    return {
        f"{name}_mean": sum(own) / count,
        f"{name}_minus_sft_mean": sum(differences) / count,
        f"{name}_minus_sft_ci_low": low,
        f"{name}_minus_sft_ci_high": high,
        f"{name}_win_rate_vs_sft": wins / count,
        f"{name}_win_rate_vs_sft_ci_low": win_low,
        f"{name}_win_rate_vs_sft_ci_high": win_high,
    }


def preference_results(
    this_run: PartialResults, evaluation: Evaluation, policy: Policy, sft: Policy, scorer: Callable, held_out: HeldOut
) -> dict[str, float]:
    """Accuracy on held-out pairs: of the policy's implicit reward, and of the reward model with its calibration."""
    judged = judge_pairs(this_run, evaluation, policy, sft, scorer, held_out)
    margins = [good - bad for good, bad in zip(judged["chosen"], judged["rejected"], strict=True)]
    probabilities = torch.sigmoid(torch.tensor(margins, dtype=torch.float64))
    confidence = torch.maximum(probabilities, 1 - probabilities).tolist()
    calibration = calibration_error(confidence, [float(margin > 0) for margin in margins])
    return {
        **accuracy("preference_accuracy", judged["implicit"], tolerance=1e-3),
        **accuracy("rm_accuracy", margins),
        "rm_calibration_error": calibration,
        "preference_pairs": len(margins),
    }


def accuracy(name: str, margins: list[float], tolerance: float = 0.0) -> dict[str, float]:
    """Share of margins above 0 with its Wilson interval; a margin within `tolerance` of 0 is a tie and counts half."""
    right = sum(1.0 if margin > tolerance else 0.5 if margin >= -tolerance else 0.0 for margin in margins)
    low, high = wilson_interval(right, len(margins))
    return {name: right / len(margins), f"{name}_ci_low": low, f"{name}_ci_high": high}


def sample_rows(held_out: HeldOut, policy: Responses, sft: Responses, eos_id: int) -> list[dict[str, Any]]:
    """One record per prompt: the policy's response beside SFT's."""
    records = []
    for index, (place, row) in enumerate(zip(held_out.prompts["row"], held_out.rows, strict=True)):
        record = {
            "row": place,
            "prompt": row["prompt"],
            "response": policy.texts[index],
            "reward": round(policy.rewards[index], 6),
            "kl": round(policy.kl[index], 6),
            "length": len(policy.ids[index]),
            "ended": policy.ids[index][-1] == eos_id,
            "sft_response": sft.texts[index],
            "sft_reward": round(sft.rewards[index], 6),
        }
        if policy.gold is not None and sft.gold is not None:
            record |= {"gold": policy.gold[index], "sft_gold": sft.gold[index]}
        records.append(record)
    return records


if __name__ == "__main__":
    run(main)
