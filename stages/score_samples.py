"""What a reward model thinks of the replies that evaluate has sampled, beside the reference's to the same prompts.

Mean score, difference from the reference and win rate against it (a tie counts half), with 95 % intervals. A reward
model with the policies' tokenizer reads their ids, one with another tokenizer the text of prompts and replies.

    python -m stages.score_samples --samples data/samples --tokenizer models/base --metrics metrics/score_samples \\
        --scores data/sample_scores --name ppo
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stages.lib.command.entries import EntryOption, entry_name
from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import read_jsonl, write_json, write_jsonl
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_params, read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.model_facts import read_config, read_model_facts
from stages.lib.settings.declaration import plain
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.score_samples import ScoreSamples

if not asks_for_help():
    from stages.lib.compute.batching import micro_batching
    from stages.lib.compute.processes import join_processes
    from stages.lib.evaluation.metrics import score_metrics, with_sources
    from stages.lib.models.pretrained import Loading, end_and_pad_ids
    from stages.lib.models.tokenizer_files import tokenizer_inputs
    from stages.lib.rl.rewards.reward_model import RewardModel, context_of, load_reward_model
    from stages.lib.runs.partial_results import NUMBER, PartialResults

SIDES = {"score": "", "reference_score": "reference_"}  # a column of scores → how the keys of a sample begin


def main(
    samples: PathOption, tokenizer: PathOption, metrics: PathOption, scores: PathOption, name: EntryOption = None
) -> None:
    """Score the SAMPLES of a policy."""
    settings = read_params("score_samples", ScoreSamples)
    name = entry_name(name, settings.policies, "score_samples.policies")
    seed, reward_model = read_seed(settings), Path(str(settings.reward_model))
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("score_samples")
    processes = join_processes(runtime)
    path = samples / f"{name}.jsonl"
    rows = list(read_jsonl(path))
    if not rows:
        raise StageError(f"{path} has no samples to score: evaluate had no prompts to answer")
    declared = {"score_samples": {key: value for key, value in plain(settings).items() if key != "policies"}}
    declared |= {"seed": seed, "trust_remote_code": trust_remote_code, "kernels": kernels}
    outs = {"metrics": metrics / f"{name}.json", "scores": scores / f"{name}.jsonl"}
    loading = Loading(settings.precision, runtime, processes.device, frozen=True, trust_remote_code=trust_remote_code)
    inputs = [path, *tokenizer_inputs(tokenizer), reward_model]
    with PartialResults(f"score_samples@{name}", declared, inputs, outs, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        batching = micro_batching(runtime, end_and_pad_ids(tokenizer)[1], processes)
        of_rewards = (reward_model, settings, loading, batching, processes, tokenizer)
        reward = load_reward_model(*of_rewards, standardise=settings.standardise_reward)
        if reward.facts and reward.facts.line():
            this_run.say(f"{this_run.stage}: {reward.facts.line()}")
        sides = {side: start for side, start in SIDES.items() if not start or f"{start}response" in rows[0]}
        vocab_size = read_model_facts(read_config(reward_model)).vocab_size if reward.texts is None else None
        require_samples(rows, [*sides.values()], vocab_size, path)

        def compute(chunk: range) -> dict[str, list]:
            some = rows[chunk.start : chunk.stop]
            return {side: scores_of_replies(reward, some, start, path) for side, start in sides.items()}

        found = this_run.keep_all("scores", len(rows), dict.fromkeys(sides, NUMBER), compute)
        own, theirs = found["score"], found.get("reference_score")
        results = with_sources(
            lambda places: score_metrics(
                [own[place] for place in places],
                None if theirs is None else [theirs[place] for place in places],
                settings.bootstrap_resamples,
                seed,
            ),
            [str(row.get("source", "")) for row in rows],
        )

        def build(staged: dict[str, Path]) -> None:
            write_json(staged["metrics"], results)
            records = [{"row": row["row"]} for row in rows]
            for side, values in found.items():
                for record, value in zip(records, values, strict=True):
                    record[side] = round(value, 6)
            write_jsonl(staged["scores"], records)

        this_run.publish(build)
    processes.leave()


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
