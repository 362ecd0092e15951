"""How good a reward model is on test pairs: accuracy with its 95 % interval, calibration and length bias.

Each is also given for each source; the accuracy besides by the difference in length, by the data's margin, and by how
sure the model is (the reliability curve). Beside it stands the accuracy of a judge that takes the longer reply.

A reward model with the pipeline's tokenizer reads the ids of pairs, one with another tokenizer their text. params.yaml
names the reward models.

    python -m stages.evaluate_rm --tokens data/tokens/test/preference.arrow \\
        --prepared data/prepared/test/preference.jsonl --tokenizer models/base --metrics metrics/evaluate_rm --name rm
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.jsonl import write_json
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.model_facts import read_config, read_model_facts
from stages.lib.models.tokenizer_files import require_tokens_of, tokenizer_inputs
from stages.lib.settings.evaluate_rm import EvaluateRm
from stages.lib.settings.runtime import read_runtime

if TYPE_CHECKING:
    from stages.lib.data.mapped_table import MappedTable

if not asks_for_help():
    import pyarrow.compute as pc

    from stages.lib.compute.batching import micro_batching
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.token_tables import PREFERENCE_SCHEMA, check_table_fits, read_table
    from stages.lib.evaluation.metrics import with_sources
    from stages.lib.evaluation.pair_scores import SIDES, scores_of_pairs, texts_of_pairs
    from stages.lib.evaluation.scored_pairs import ScoredPairs, metrics_of_parts, reward_model_metrics
    from stages.lib.models.pretrained import Loading, end_and_pad_ids
    from stages.lib.rl.rewards.reward_model import load_reward_model
    from stages.lib.runs.partial_results import NUMBER, PartialResults


def main(
    tokens: PathOption, prepared: PathOption, tokenizer: PathOption, metrics: PathOption, name: EntryOption = None
) -> None:
    """Evaluate a reward model on the pairs in TOKENS, whose text is in PREPARED."""
    name, settings = read_entry("evaluate_rm", EvaluateRm, name)
    reward_model = Path(settings.reward_model)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("evaluate_rm")
    processes = join_processes(runtime)
    require_tokens_of(tokens, tokenizer)
    pairs = read_table(tokens, PREFERENCE_SCHEMA)
    declared = {f"evaluate_rm.{name}": settings, "trust_remote_code": trust_remote_code, "kernels": kernels}
    inputs, outs = [tokens, prepared, *tokenizer_inputs(tokenizer), reward_model], {"metrics": metrics / f"{name}.json"}
    loading = Loading(settings.precision, runtime, processes.device, frozen=True, trust_remote_code=trust_remote_code)
    with PartialResults(f"evaluate_rm@{name}", declared, inputs, outs, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        batching = micro_batching(runtime, end_and_pad_ids(tokenizer)[1], processes)
        reward = load_reward_model(reward_model, settings, loading, batching, processes, tokenizer)
        if reward.facts and reward.facts.line():
            this_run.say(f"{this_run.stage}: {reward.facts.line()}")

        if reward.texts is None:
            check_table_fits(pairs, read_model_facts(read_config(reward_model)), tokens)
        texts = None if reward.texts is None else texts_of_pairs(prepared, pairs["row"][:])

        def compute(chunk: range) -> dict[str, list]:
            return scores_of_pairs(reward, pairs[chunk.start : chunk.stop], texts, tokens)

        found = this_run.keep_all("pairs", len(pairs), dict.fromkeys(SIDES, NUMBER), compute)
        lengths = {f"{side}_lengths": lengths_of(pairs, side) for side in SIDES}
        scored = ScoredPairs(**found, **lengths, margins=pairs["margin"][:])
        results = with_sources(lambda places: reward_model_metrics(scored.of(places)), pairs["source"][:])
        results |= metrics_of_parts(scored)
        this_run.publish(lambda staged: write_json(staged["metrics"], results))
    processes.leave()


def lengths_of(pairs: MappedTable, side: str) -> list[int]:
    """The tokens of one reply of each pair."""
    return pc.list_value_length(pairs.data.column(f"{side}_ids")).to_pylist()


if __name__ == "__main__":
    run(main)
