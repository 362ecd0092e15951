"""Direct preference optimization (arXiv 2305.18290) from cached reference log-probs; no reference model in memory.

    sigmoid  L = −(1−ε) log σ(β h) − ε log σ(−β h)     (Eq. 7; ε > 0 is conservative DPO)
    ipo      L = (Δ_c / |y_c| − Δ_r / |y_r| − 1/(2β))²  (arXiv 2310.12036, Eq. 17)

with Δ = log π(y|x) − log π_ref(y|x) summed over completion tokens and h = Δ_c − Δ_r; the mean is over all pairs of the
optimizer step.

    python -m stages.train_dpo --tokens data/tokens/preference --ref-logprobs data/ref_logprobs --model models/sft \\
        --out models/dpo --metrics metrics/train_dpo.json --curve metrics/curves/train_dpo.csv
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_params, read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_dpo import TrainDpo

if not asks_for_help():
    from stages.lib.command.hashing import dvc_hash
    from stages.lib.compute.batching import micro_batching, rows_of_step, steps_in
    from stages.lib.compute.engine.choice import new_engine
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.reference_tables import read_reference, require_made_from
    from stages.lib.data.token_tables import PREFERENCE_SCHEMA, check_table_fits, read_note, read_table
    from stages.lib.models.lora import Lora
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of, load_language_model
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.objectives.fit import fit
    from stages.lib.objectives.preference import PreferenceObjective
    from stages.lib.objectives.reference_start import require_start
    from stages.lib.runs.publish_kept import publish_kept
    from stages.lib.runs.training_run import TrainingRun

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
METRICS = ("loss", *REWARDS, "logps/chosen", "logps/rejected")
COLUMNS = (*METRICS, "grad_norm", "learning_rate", *(f"eval/{name}" for name in METRICS))
SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "eval/loss")


class Pairs:
    """Preference tokens joined with the reference log-probs of the same rows."""

    def __init__(self, tokens: Path, ref_logprobs: Path) -> None:
        self.tokens_path, self.path = tokens, ref_logprobs
        self.tokens = read_table(tokens, PREFERENCE_SCHEMA)
        self.reference = read_reference(ref_logprobs, self.tokens, tokens)

    def require_reference_like(self, settings: TrainDpo) -> None:
        """Raise StageError if the reference's numbers are not those of the policy before its first step."""
        for reason, note, own in (
            ("train_dpo.precision is", "precision", settings.precision),
            ("train_dpo trains on base_quantization", "base_quantization", str(quantization_of_base(settings.lora))),
        ):
            reference = read_note(self.path, note)
            if reference != own:
                raise StageError(
                    f"params.yaml: {reason} {own}, but {self.path.parent} was computed with {note} {reference}: "
                    "the first step's margin would not be 0; give ref_logprobs and train_dpo the same"
                )

    def require_made_from_inputs(self, model: Path, this_run: TrainingRun) -> None:
        """Raise StageError if the reference is of other tokens, or of another model than the policy starts from."""
        tokens = (self.tokens_path, dvc_hash(self.tokens_path))
        require_made_from(self.path, tokens=tokens, model=(model, this_run.own_scratch.input_hashes[str(model)]))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> dict[str, list]:
        return {**self.tokens[rows], **self.reference[rows]}


def main(
    tokens: PathOption,
    ref_logprobs: PathOption,
    model: PathOption,
    out: PathOption,
    metrics: PathOption,
    curve: PathOption,
) -> None:
    """Train MODEL on the pairs in TOKENS against their cached reference log-probs."""
    settings = read_params("train_dpo", TrainDpo)
    seed = read_seed(settings)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("train_dpo")
    processes = join_processes(runtime)
    train, held_out = (Pairs(tokens / f"{split}.arrow", ref_logprobs / f"{split}.arrow") for split in ("train", "eval"))
    train.require_reference_like(settings)
    require_tokens_of(tokens, model)
    outs = {"model": out, "metrics": metrics, "curve": curve}
    inputs = [tokens, ref_logprobs, model]
    declared = {"train_dpo": settings, "seed": seed, "trust_remote_code": trust_remote_code, "kernels": kernels}
    with TrainingRun("train_dpo", declared, inputs, outs, COLUMNS, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        for pairs in (train, held_out):
            processes.in_main(partial(pairs.require_made_from_inputs, model, this_run))
        quantization = quantization_of_base(settings.lora)
        loading = Loading(
            settings.precision, runtime, processes.device, quantization, trust_remote_code=trust_remote_code
        )
        language_model = load_language_model(model, loading)
        lora = Lora(language_model, settings.lora, seed, model)
        for pairs, split in ((train, "train"), (held_out, "eval")):
            check_table_fits(pairs.tokens, facts_of(language_model), tokens / f"{split}.arrow")
        total = steps_in(len(train), settings.batch_size, settings.epochs)
        module = TokenLogProbs(language_model, chunk_tokens=runtime.logits_chunk_tokens)
        engine = new_engine(module, settings.optimizer, total, runtime, processes)
        batching = micro_batching(runtime, end_and_pad_ids(model)[1], processes)
        this_run.say(f"train_dpo: {len(train)} pairs, {total} steps")
        # Before `fit` goes on from a checkpoint: this is the policy that the reference was computed from.
        first_rows = rows_of_step(0, len(train), settings.batch_size, settings.epochs, seed)
        for pairs, rows in ((train, first_rows), (held_out, slice(settings.batch_size))):
            require_start(engine, pairs[rows], batching, pairs.path, settings.precision)
        best = fit(
            this_run,
            engine,
            PreferenceObjective(batching, settings.loss),
            train,
            held_out,
            settings,
            seed,
            weights=lambda: lora.trained(engine.master_weights(language_model)),
            shown=SHOWN,
        )
        results = {f"eval_{name.replace('/', '_')}": value for name, value in best.results.items()}
        results |= {"train_rows": len(train), "eval_rows": len(held_out), "steps": total}
        publish_kept(this_run, engine, lora, best, results, settings, tokenizer_from=model)
    processes.leave()


if __name__ == "__main__":
    run(main)
