"""What a reward model thinks of the replies that evaluate has sampled, beside the reference's to the same prompts.

Mean score, difference from the reference and win rate against it (a tie counts half), with 95 % intervals. A reward
model with the policies' tokenizer reads their ids, one with another tokenizer the text of prompts and replies.

Over-optimisation is measured against the replies of the test pairs, which nothing has selected by their score: how far
a policy lies from the line that there relates the score to the gold utility, or to the score of a second reward model.

    python -m stages.score_samples --samples data/samples --tokens data/tokens/test --prepared data/prepared/test \\
        --tokenizer models/base --metrics metrics/score_samples --scores data/sample_scores --name ppo
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.lib.command.entries import EntryOption, entry_name
from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import read_jsonl, write_json, write_jsonl
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_params, read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.model_facts import read_config, read_model_facts
from stages.lib.models.tokenizer_files import require_tokens_of, tokenizer_inputs
from stages.lib.settings.declaration import plain
from stages.lib.settings.prepare_data import PrepareData
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.score_samples import ScoreSamples
from stages.lib.tasks.table import grades

if TYPE_CHECKING:
    from stages.lib.data.conversation_rows import Conversation
    from stages.lib.data.mapped_table import MappedTable

if not asks_for_help():
    from stages.lib.compute.batching import micro_batching
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.prompts import Prompt
    from stages.lib.data.token_tables import PREFERENCE_SCHEMA, check_table_fits, read_table
    from stages.lib.evaluation.metrics import Places, score_metrics, with_sources
    from stages.lib.evaluation.pair_scores import SIDES, scores_of_pairs, texts_of_pairs
    from stages.lib.evaluation.reward_line import PairValues, residual_metrics
    from stages.lib.models.pretrained import Loading, end_and_pad_ids
    from stages.lib.rl.rewards.reward_model import RewardModel, context_of, load_reward_model
    from stages.lib.runs.partial_results import NUMBER, PartialResults

REPLY_STARTS = {"score": "", "reference_score": "reference_"}  # whose score → how the keys of a sample begin
Columns = dict[str, list[float]]


class HeldOutPairs(NamedTuple):
    """The test pairs whose replies give the line."""

    path: Path
    table: MappedTable
    rows: range  # of the table
    texts: list[Conversation]  # of all prepared rows


class Scored(NamedTuple):
    """What one reward model says of the samples and of the test pairs."""

    samples: Columns  # by REPLY_STARTS
    pairs: Columns  # by side; empty without pairs


def main(
    samples: PathOption,
    tokens: PathOption,
    prepared: PathOption,
    tokenizer: PathOption,
    metrics: PathOption,
    scores: PathOption,
    name: EntryOption = None,
) -> None:
    """Score the SAMPLES of a policy."""
    settings = read_params("score_samples", ScoreSamples)
    name = entry_name(name, settings.policies, "score_samples.policies")
    seed = read_seed(settings)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    has_pairs = "preference" in read_params("prepare_data", PrepareData).kinds
    runtime = read_runtime("score_samples")
    processes = join_processes(runtime)
    path = samples / f"{name}.jsonl"
    rows = list(read_jsonl(path))
    if not rows:
        raise StageError(f"{path} has no samples to score: evaluate had no prompts to answer")
    held_out = read_pairs(tokens, prepared, tokenizer, settings.max_pairs) if has_pairs else None
    declared = {"score_samples": {key: value for key, value in plain(settings).items() if key != "policies"}}
    declared |= {"seed": seed, "trust_remote_code": trust_remote_code, "kernels": kernels}
    outs = {"metrics": metrics / f"{name}.json", "scores": scores / f"{name}.jsonl"}
    loading = Loading(settings.precision, runtime, processes.device, frozen=True, trust_remote_code=trust_remote_code)
    inputs = [path, *tokenizer_inputs(tokenizer), *dict.fromkeys(map(Path, settings.reward_models.values()))]
    inputs += [held_out.path, prepared / "preference.jsonl"] if held_out else []
    with PartialResults(f"score_samples@{name}", declared, inputs, outs, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        batching = micro_batching(runtime, end_and_pad_ids(tokenizer)[1], processes)
        scored: dict[str, Scored] = {}
        for measure, folder in settings.reward_models.items():
            of_rewards = (Path(folder), settings.reading_of(measure), loading, batching, processes, tokenizer)
            reward = load_reward_model(*of_rewards, standardise=settings.standardise_reward and measure == "reward")
            if reward.facts and reward.facts.line():
                this_run.say(f"{this_run.stage}: {reward.facts.line()}")
            of_pairs = score_pairs(this_run, measure, reward, held_out) if held_out else {}
            scored[measure] = Scored(score_samples(this_run, measure, reward, rows, path), of_pairs)
        drawn = (settings.bootstrap_resamples, seed)
        better = better_measures(rows, scored, held_out)
        results = with_sources(
            lambda places: comparisons(scored, places, *drawn) | residuals(scored["reward"], better, places, *drawn),
            [str(row.get("source", "")) for row in rows],
        )

        def build(staged: dict[str, Path]) -> None:
            write_json(staged["metrics"], results)
            write_jsonl(staged["scores"], score_records(rows, scored))

        this_run.publish(build)
    processes.leave()


def read_pairs(tokens: Path, prepared: Path, tokenizer: Path, max_pairs: int | None) -> HeldOutPairs:
    """The first of the test pairs. Raises StageError if table or rows are missing, damaged or not of each other."""
    path = tokens / "preference.arrow"
    require_tokens_of(path, tokenizer)
    table = read_table(path, PREFERENCE_SCHEMA)
    texts = texts_of_pairs(prepared / "preference.jsonl", table["row"][:])
    return HeldOutPairs(path, table, range(len(table))[:max_pairs], texts)


def score_pairs(this_run: PartialResults, measure: str, reward: RewardModel, held_out: HeldOutPairs) -> Columns:
    """The scores of both replies of each pair, by side."""
    table, path = held_out.table, held_out.path
    if reward.texts is None:
        check_table_fits(table, read_model_facts(read_config(Path(path_of(reward)))), path)

    def compute(chunk: range) -> dict[str, list]:
        return scores_of_pairs(reward, table[chunk.start : chunk.stop], held_out.texts, path)

    return this_run.keep_all(f"{measure}-pairs", len(held_out.rows), dict.fromkeys(SIDES, NUMBER), compute)


def score_samples(
    this_run: PartialResults, measure: str, reward: RewardModel, rows: list[dict[str, Any]], path: Path
) -> Columns:
    """The scores of the policy's replies and, where the samples have them, of the reference's."""
    starts = {side: start for side, start in REPLY_STARTS.items() if not start or f"{start}response" in rows[0]}
    vocab_size = read_model_facts(read_config(Path(path_of(reward)))).vocab_size if reward.texts is None else None
    require_samples(rows, [*starts.values()], vocab_size, path)

    def compute(chunk: range) -> dict[str, list]:
        some = rows[chunk.start : chunk.stop]
        return {side: scores_of_replies(reward, some, start, path) for side, start in starts.items()}

    return this_run.keep_all(f"{measure}-samples", len(rows), dict.fromkeys(starts, NUMBER), compute)


def path_of(reward: RewardModel) -> str:
    assert reward.facts is not None, "it was loaded from a folder"
    return reward.facts.path


def better_measures(
    rows: list[dict[str, Any]], scored: dict[str, Scored], held_out: HeldOutPairs | None
) -> dict[str, tuple[list[float | None], PairValues]]:
    """What the reward is held against: of each reply of the policy, and of both replies of each pair."""
    if held_out is None:
        return {}
    found: dict[str, tuple[list[float | None], PairValues]] = {
        "gold": ([row.get("gold") for row in rows], gold_of_pairs(held_out))
    }
    judges = {name: said for name, said in scored.items() if name != "reward"}
    return found | {name: ([*said.samples["score"]], said.pairs) for name, said in judges.items()}


def gold_of_pairs(held_out: HeldOutPairs) -> dict[str, list[float | None]]:
    """The grades of both replies of each pair by the task that its facts name, if they name one."""
    numbers = [held_out.table["row"][place] for place in held_out.rows]
    texts = [held_out.texts[number] for number in numbers]
    prompts = [Prompt(number, [], text.prompt, text.facts) for number, text in zip(numbers, texts, strict=True)]
    where = f"{held_out.path}"
    replies = {side: [text.replies[at]["content"] for text in texts] for at, side in enumerate(SIDES)}
    return {side: grades(prompts, contents, where) for side, contents in replies.items()}


def comparisons(scored: dict[str, Scored], places: Places, resamples: int, seed: int) -> dict[str, float]:
    """What each reward model says of some of the replies, beside the reference's."""
    found: dict[str, float] = {}
    for measure, (samples, _) in scored.items():
        own, *theirs = ([samples[side][place] for place in places] for side in samples)
        found |= score_metrics(own, theirs[0] if theirs else None, resamples, seed, measure)
    return found


def residuals(
    reward: Scored,
    better: dict[str, tuple[list[float | None], PairValues]],
    places: Places,
    resamples: int,
    seed: int,
) -> dict[str, float]:
    """How far some of the policy's replies lie from the line, by each better measure."""
    found: dict[str, float] = {}
    for measure, (of_replies, of_pairs) in better.items():
        own = [(reward.samples["score"][place], of_replies[place]) for place in places]
        found |= residual_metrics(measure, own, reward.pairs, of_pairs, resamples, seed)
    return found


def score_records(rows: list[dict[str, Any]], scored: dict[str, Scored]) -> list[dict[str, Any]]:
    """Each sample's row and scores; a second reward model's behind its name."""
    records = [{"row": row["row"]} for row in rows]
    for measure, (samples, _) in scored.items():
        for side, values in samples.items():
            key = side if measure == "reward" else f"{measure}_{side}"
            for record, value in zip(records, values, strict=True):
                record[key] = round(value, 6)
    return records


def require_samples(rows: list[dict[str, Any]], starts: list[str], vocab_size: int | None, path: Path) -> None:
    """Raise a StageError that names the first row that is not one of evaluate's samples.

    Args:
        starts: how the keys of its replies begin.
        vocab_size: of a reward model that reads the ids of samples; None: it reads their text.
    """
    replies = [f"{start}response" for start in starts]
    for line, row in enumerate(rows, start=1):
        fits = type(row.get("row")) is int and is_text_or_messages(row.get("prompt"))
        fits = fits and all(isinstance(row.get(reply), str) for reply in replies)
        fits = fits and isinstance(row.get("tools", []), list) and isinstance(row.get("template_arguments", {}), dict)
        if vocab_size is not None:
            fits = fits and all(are_ids(row.get(f"{part}_ids"), vocab_size) for part in ("prompt", *replies))
        if not fits:
            raise StageError(f"{path}, line {line}: not a sample of evaluate's; run evaluate@{path.stem} again")


def is_text_or_messages(value: Any) -> bool:
    """True for a text, or messages."""
    if not isinstance(value, list):
        return isinstance(value, str)
    return all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in value) and bool(value)


def are_ids(value: Any, vocab_size: int) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < vocab_size for one in value)


def scores_of_replies(reward: RewardModel, rows: list[dict[str, Any]], start: str, path: Path) -> list[float]:
    """The score of each reply. Raises a StageError naming the row of a score that is not a number."""
    if reward.texts is None:
        found = reward.score_ids([row["prompt_ids"] for row in rows], [row[f"{start}response_ids"] for row in rows])
    else:
        prompts, replies = [row["prompt"] for row in rows], [row[f"{start}response"] for row in rows]
        found = reward.score_texts(prompts, replies, contexts=[context_of(row) for row in rows])
    for row, score in zip(rows, found, strict=True):
        if not math.isfinite(score):
            raise StageError(f"{path}, row {row['row']}: the score of a reply is {score}; the reward model is broken")
    return found


if __name__ == "__main__":
    run(main)
