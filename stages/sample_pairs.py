"""Rows made of a policy's own replies: several to each prompt of a round, ranked by the rewards of the entry.

    best_and_worst  of each prompt the reply with the highest score against the one with the lowest
    all_pairs       every two replies to a prompt, the one with the higher score chosen
    best_of_n       the reply with the highest score, as a row for SFT

The rows hold the ids that were sampled, so that nothing is rendered or encoded again; a pair's margin is the difference
of its scores. Training on them, and sampling from what was trained, is on-policy DPO or rejection sampling, round by
round: each round an entry of params.yaml, on prompts that its model was not trained on in an earlier round. A reply's
random numbers belong to (seed, round, row, sample).

    python -m stages.sample_pairs --tokens data/tokens --out data/sampled --metrics metrics/sample_pairs --name first
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import write_json, write_jsonl
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import tokenizer_hash
from stages.lib.settings.reward_functions import reward_files
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.sample_pairs import SamplePairs

if TYPE_CHECKING:
    from stages.lib.data.mapped_table import MappedTable
    from stages.lib.data.prompts import Prompt

if not asks_for_help():
    from stages.lib.compute.batching import epoch_order, micro_batching
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.prompts import prompts_of
    from stages.lib.data.token_tables import TOKENIZER_NOTE, write_table_rows
    from stages.lib.models.pretrained import Loading
    from stages.lib.operations.progress import Progress
    from stages.lib.rl.prompt_table import read_prompts, require_fit
    from stages.lib.rl.ranked_replies import REASONS, ScoredReply
    from stages.lib.rl.rewards.entry_rewards import load_entry_rewards
    from stages.lib.rl.rewards.mixture import Mixture
    from stages.lib.rl.sampled_rows import SCHEMAS, SampledRows, sample_metrics
    from stages.lib.rl.samplers.frozen_policy import frozen_sampler
    from stages.lib.rl.samplers.own import OwnSampler
    from stages.lib.runs.partial_results import NUMBERS, SEVERAL_IDS, PartialResults

FIRST_ROUND = 2**30  # counted as steps of sampling that no training and no evaluation uses


def main(tokens: PathOption, out: PathOption, metrics: PathOption, name: EntryOption = None) -> None:
    """Sample replies to prompts in TOKENS, and make rows of them."""
    name, settings = read_entry("sample_pairs", SamplePairs, name)
    model = Path(settings.model)
    order_seed, seed = read_value("seed", int), read_seed(settings)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("sample_pairs")
    processes = join_processes(runtime)
    path = tokens / settings.split / "prompts.arrow"
    table = read_prompts(path, model)
    prompts = prompts_of_round(table, path, settings, order_seed, f"sample_pairs.{name}")
    declared = {f"sample_pairs.{name}": settings, "seed": [order_seed, seed]}
    declared |= {"trust_remote_code": trust_remote_code, "kernels": kernels}
    outs = {"rows": out / name, "metrics": metrics / f"{name}.json"}
    loading = Loading(settings.precision, runtime, processes.device, frozen=True, trust_remote_code=trust_remote_code)
    of_rewards = map(Path, reward_files(settings.rewards, f"sample_pairs.{name}.rewards"))
    inputs = [path, model, Path(settings.reward_model), *of_rewards]
    with PartialResults(f"sample_pairs@{name}", declared, inputs, outs, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        sampler = frozen_sampler(model, settings, seed, loading, processes)
        require_fit(table, path, sampler.language_model, settings.max_new_tokens, f"sample_pairs.{name}")
        batching = micro_batching(runtime, sampler.pad_id, processes)
        reward = load_entry_rewards(settings, model, settings.max_new_tokens, loading, batching, processes)
        for part in reward.by_name.values():
            facts = getattr(part.reward, "facts", None)  # of a reward model
            if facts and facts.line():
                this_run.say(f"{this_run.stage}: {facts.line()}")
        replies = replies_to(prompts, sampler, reward, settings, this_run)
        rows, dropped = SampledRows(), Counter(dict.fromkeys(REASONS, 0))
        for prompt, own in zip(prompts, replies, strict=True):
            rows.add(prompt, own, settings.makes, dropped)
        if not rows.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()) if count)
            raise StageError(f"params.yaml: sample_pairs.{name}: no row is left of {len(prompts)} prompts ({reasons})")
        results = sample_metrics(replies, rows.rows, dropped)
        this_run.say(sentence_on(this_run.stage, results, settings))
        for line in rows.shown(runtime.shown_samples):
            this_run.say(line)

        def build(staged: dict[str, Path]) -> None:
            schema = SCHEMAS[settings.kind].with_metadata({TOKENIZER_NOTE: tokenizer_hash(model)})
            write_table_rows(staged["rows"] / settings.split / f"{settings.kind}.arrow", rows.rows, schema)
            write_jsonl(staged["rows"] / "samples.jsonl", rows.samples)
            write_json(staged["metrics"], results)

        this_run.publish(build)
    processes.leave()


def prompts_of_round(table: MappedTable, path: Path, settings: SamplePairs, seed: int, key: str) -> list[Prompt]:
    """The prompts of a round, in the order of their rows: a prompt that stands in several rows is in one round alone.

    Raises:
        StageError: there are not as many; `key` is that of the settings.
    """
    first: dict[tuple[int, ...], int] = {}
    for place, ids in enumerate(table["prompt_ids"]):
        first.setdefault(tuple(ids), place)
    places = [*first.values()]
    if settings.asked.stop > len(places):
        raise StageError(
            f"params.yaml: {key}: round {settings.round} of {settings.prompts} prompts needs {settings.asked.stop} of "
            f"them, and {path} has {len(places)} different ones; lower prompts, or bring more"
        )
    order = epoch_order(len(places), seed, 0)
    return prompts_of(table[sorted(places[int(order[place])] for place in settings.asked)])


def replies_to(
    prompts: list[Prompt], sampler: OwnSampler, reward: Mixture, settings: SamplePairs, this_run: PartialResults
) -> list[list[ScoredReply]]:
    """The replies to each prompt with their scores, sampled and kept chunk by chunk."""
    count = settings.samples_per_prompt
    progress = Progress(this_run.stage, len(prompts), this_run.runtime.log_seconds, unit="replies")

    def compute(chunk: range) -> dict[str, list]:
        episodes = sampler.sample(prompts[chunk.start : chunk.stop], FIRST_ROUND + settings.round, count)
        scores = reward.scored(episodes).totals
        groups = range(0, len(episodes), count)
        return {
            "ids": [[episode.ids for episode in episodes[start : start + count]] for start in groups],
            "scores": [scores[start : start + count] for start in groups],
        }

    replies = []
    for chunk in this_run.chunks(len(prompts)):
        columns = {"ids": SEVERAL_IDS, "scores": NUMBERS}
        kept = this_run.keep(f"replies-{chunk.start}-{chunk.stop}", len(chunk), columns, partial(compute, chunk))
        for ids, scores in zip(kept["ids"], kept["scores"], strict=True):
            replies.append([scored_reply(sampler, *both) for both in zip(ids, scores, strict=True)])
        if this_run.processes.is_main:
            means = [reply.score for group in replies[chunk.start :] for reply in group]
            progress.update(chunk.stop, len(means), {"reward": sum(means) / len(means)})
    return replies


def scored_reply(sampler: OwnSampler, ids: list[int], score: float) -> ScoredReply:
    return ScoredReply(ids, sampler.decode(ids), ids[-1] == sampler.eos_id, score)


def sentence_on(stage: str, results: dict[str, float], settings: SamplePairs) -> str:
    """A line that says what was made."""
    what = "pairs" if settings.kind == "preference" else "rows for SFT"
    return (
        f"{stage}: {results['rows']:,} {what} of {results['prompts']:,} prompts; reward of the best reply "
        f"{results['reward_best_mean']:.3f}, of any {results['reward_mean']:.3f}, of the worst "
        f"{results['reward_worst_mean']:.3f}; {results['replies_distinct_share']:.1%} of the replies differ"
    )


if __name__ == "__main__":
    run(main)
