"""How often a policy's responses to each train prompt pass, and the prompts that are neither too easy nor too hard.

Several responses to each prompt, by the model that training is to start from, are judged by the rewards of the entry. A
prompt that all of them pass, or none, teaches next to nothing. What is kept becomes a folder of token tables that
train_grpo.<name>.tokens may name, and beside it stands a control: as many prompts, drawn from all that were asked. Only
a policy trained on the control says whether the filter was worth its samples, or fewer prompts would have done.

    python -m stages.pass_rates --tokens data/tokens/train/prompts.arrow --out data/pass_rates \\
        --metrics metrics/pass_rates --name first
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import write_json, write_jsonl
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import tokenizer_hash
from stages.lib.settings.pass_rates import PassRates
from stages.lib.settings.reward_functions import reward_files
from stages.lib.settings.runtime import read_runtime

if not asks_for_help():
    from stages.lib.compute.batching import micro_batching
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.mapped_table import MappedTable
    from stages.lib.data.prompts import Prompt, prompts_of
    from stages.lib.data.token_tables import PROMPT_SCHEMA, TOKENIZER_NOTE, write_table_rows
    from stages.lib.models.pretrained import Loading
    from stages.lib.operations.progress import Progress
    from stages.lib.rl.chosen_prompts import ChosenPrompts, chosen_prompts, drawn_places, pass_rate
    from stages.lib.rl.prompt_table import read_prompts, require_fit
    from stages.lib.rl.rewards.entry_rewards import load_entry_rewards
    from stages.lib.rl.rewards.mixture import Mixture
    from stages.lib.rl.samplers.frozen_policy import frozen_sampler
    from stages.lib.rl.samplers.own import OwnSampler
    from stages.lib.runs.partial_results import NUMBERS, PartialResults

STEP = 2**30 + 2**29  # counted as a step of sampling that nothing else uses


def main(tokens: PathOption, out: PathOption, metrics: PathOption, name: EntryOption = None) -> None:
    """Sample responses to the prompts in TOKENS, and keep those of a middling pass rate."""
    name, settings = read_entry("pass_rates", PassRates, name)
    model, key = Path(settings.model), f"pass_rates.{name}"
    seed, trust_remote_code = read_seed(settings), read_value("trust_remote_code", bool)
    runtime, kernels = read_runtime("pass_rates"), read_value("kernels", Kernels)
    processes = join_processes(runtime)
    table = read_prompts(tokens, model)
    places = asked_places(table, tokens, settings, seed, key)
    declared = {key: settings, "seed": seed, "trust_remote_code": trust_remote_code, "kernels": kernels}
    inputs = [tokens, model, Path(settings.reward_model), *map(Path, reward_files(settings.rewards, f"{key}.rewards"))]
    outs = {"prompts": out / name, "metrics": metrics / f"{name}.json"}
    loading = Loading(settings.precision, runtime, processes.device, frozen=True, trust_remote_code=trust_remote_code)
    with PartialResults(f"pass_rates@{name}", declared, inputs, outs, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        sampler = frozen_sampler(model, settings, seed, loading, processes)
        require_fit(table, tokens, sampler.language_model, settings.max_new_tokens, key)
        batching = micro_batching(runtime, sampler.pad_id, processes)
        reward = load_entry_rewards(settings, model, settings.max_new_tokens, loading, batching, processes)
        prompts = prompts_of(table[places])
        rewards = rewards_of(prompts, sampler, reward, settings, this_run)
        rates = [pass_rate(own, settings.passes_above) for own in rewards]
        chosen = chosen_prompts(rates, settings, seed)
        results = results_of(rewards, rates, chosen)
        this_run.say(told_rates(this_run.stage, results))
        if not chosen.kept:
            raise StageError(f"params.yaml: {key}: no prompt is left of {len(prompts)}; widen keep_from and keep_to")

        def build(staged: dict[str, Path]) -> None:
            schema = PROMPT_SCHEMA.with_metadata({TOKENIZER_NOTE: tokenizer_hash(model)})
            for part in ("kept", "control"):
                rows = (table[places[place]] for place in getattr(chosen, part))
                write_table_rows(staged["prompts"] / part / "train/prompts.arrow", rows, schema)
            told = zip(prompts, rates, rewards, strict=True)
            rows = [{"row": prompt.row, "pass_rate": rate, "rewards": own} for prompt, rate, own in told]
            write_jsonl(staged["prompts"] / "pass_rates.jsonl", rows)
            write_json(staged["metrics"], results)

        this_run.publish(build)
    processes.leave()


def asked_places(table: MappedTable, path: Path, settings: PassRates, seed: int, key: str) -> list[int]:
    """The places of the prompts that are asked. Raises StageError if there are not as many."""
    count = len(table) if settings.prompts is None else settings.prompts
    if not 0 < count <= len(table):
        raise StageError(f"params.yaml: {key}.prompts: {path} has {len(table)} prompts, and {count} are to be asked")
    return drawn_places(len(table), count, seed, "prompts")


def rewards_of(
    prompts: list[Prompt], sampler: OwnSampler, reward: Mixture, settings: PassRates, this_run: PartialResults
) -> list[list[float]]:
    """The rewards of the responses to each prompt, sampled and kept chunk by chunk."""
    count = settings.samples_per_prompt
    progress = Progress(this_run.stage, len(prompts), this_run.runtime.log_seconds, unit="responses")

    def compute(chunk: range) -> dict[str, list]:
        scores = reward.scored(sampler.sample(prompts[chunk.start : chunk.stop], STEP, count)).totals
        return {"rewards": [scores[start : start + count] for start in range(0, len(scores), count)]}

    found: list[list[float]] = []
    for chunk in this_run.chunks(len(prompts)):
        kept = this_run.keep(
            f"rewards-{chunk.start}-{chunk.stop}", len(chunk), {"rewards": NUMBERS}, partial(compute, chunk)
        )
        found += kept["rewards"]
        if this_run.processes.is_main:
            rates = [pass_rate(own, settings.passes_above) for own in kept["rewards"]]
            progress.update(chunk.stop, len(chunk) * count, {"pass_rate": sum(rates) / len(rates)})
    return found


def results_of(rewards: list[list[float]], rates: list[float], chosen: ChosenPrompts) -> dict[str, float]:
    """The metrics: how many prompts were asked, kept and left out and why, and their mean pass rates."""
    flat = [reward for own in rewards for reward in own]

    def mean_rate(places: list[int]) -> float:
        return sum(rates[place] for place in places) / max(1, len(places))

    return {
        "prompts": len(rates),
        "kept": len(chosen.kept),
        "too_hard": len(chosen.too_hard),
        "too_easy": len(chosen.too_easy),
        "control_that_is_kept": len({*chosen.kept} & {*chosen.control}),
        "reward_mean": sum(flat) / len(flat),
        "pass_rate_mean": mean_rate([*range(len(rates))]),
        "pass_rate_kept_mean": mean_rate(chosen.kept),
        "pass_rate_control_mean": mean_rate(chosen.control),
    }


def told_rates(stage: str, results: dict[str, float]) -> str:
    """A line that says what was kept."""
    return (
        f"{stage}: {results['kept']:,} of {results['prompts']:,} prompts are kept, {results['too_hard']:,} are too "
        f"hard and {results['too_easy']:,} too easy; {results['pass_rate_mean']:.1%} of all responses pass, "
        f"{results['pass_rate_kept_mean']:.1%} of those to the kept prompts"
    )


if __name__ == "__main__":
    run(main)
