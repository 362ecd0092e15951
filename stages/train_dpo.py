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
from stages.lib.command.params import read_params, read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_dpo import TrainDpo

if not asks_for_help():
    import torch

    from stages.lib.command.hashing import dvc_hash
    from stages.lib.compute.batching import (
        MicroBatching,
        is_due,
        micro_batching,
        rows_of_step,
        steps_in,
        tokens_in_pairs,
    )
    from stages.lib.compute.engine.base import Engine, require_finite
    from stages.lib.compute.engine.choice import new_engine
    from stages.lib.compute.processes import join_processes
    from stages.lib.compute.sequence_logprobs import pair_logps
    from stages.lib.data.token_tables import PREFERENCE_SCHEMA, check_table_fits, read_note, read_table
    from stages.lib.models.lora import Lora
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of, load_language_model
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.objectives.dpo_loss import preference_losses
    from stages.lib.objectives.reference_logprobs import read_reference, require_made_from, require_start
    from stages.lib.runs.best_weights import BestWeights
    from stages.lib.runs.training_run import TrainingRun

PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
COLUMNS = (*PAIR_METRICS, "grad_norm", "learning_rate", *(f"eval/{name}" for name in PAIR_METRICS))


class PairLoss:
    """The loss and metrics of pairs, each process running its part of the micro-batches."""

    def __init__(self, settings: TrainDpo, batching: MicroBatching) -> None:
        self.settings = settings
        self.batching = batching

    def __call__(self, engine: Engine, pairs: dict[str, list], *, train: bool) -> dict[str, float]:
        """Add the gradient of the mean loss (if `train`). Returns the means of PAIR_METRICS over all processes."""
        sums = self.batching.budget.attempt(lambda: self._own_passes(engine, pairs, train), engine)
        means = [total / len(pairs["prompt_ids"]) for total in self.batching.processes.sum(sums.tolist())]
        return dict(zip(PAIR_METRICS, means, strict=True))

    def _own_passes(self, engine: Engine, pairs: dict[str, list], train: bool) -> torch.Tensor:
        """The sums of PAIR_METRICS over this process's passes."""
        count = len(pairs["prompt_ids"])
        sums = torch.zeros(len(PAIR_METRICS), dtype=torch.float64)
        for batch in self.batching.pairs(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"]):
            with torch.set_grad_enabled(train):
                logps = pair_logps(engine, batch)
                result = self._losses(logps.chosen, logps.rejected, pairs, batch.rows)
                if train:
                    engine.backward(result.losses.sum() / count)
            margins = result.chosen_rewards - result.rejected_rewards
            accuracies = (margins > 0).double() + 0.5 * (margins == 0).double()
            parts = (result.losses, result.chosen_rewards, result.rejected_rewards, margins, accuracies, *logps)
            sums += torch.stack([part.detach().double().sum().cpu() for part in parts])
        return sums

    def _losses(self, chosen: torch.Tensor, rejected: torch.Tensor, pairs: dict[str, list], rows: list[int]) -> Any:
        def column(name: str) -> torch.Tensor:
            return torch.tensor([pairs[name][row] for row in rows], device=chosen.device)

        def lengths(name: str) -> torch.Tensor:
            return torch.tensor([len(pairs[name][row]) for row in rows], device=chosen.device)

        return preference_losses(
            chosen,
            rejected,
            column("reference_chosen_logps"),
            column("reference_rejected_logps"),
            loss_type=self.settings.loss_type,
            beta=self.settings.beta,
            label_smoothing=self.settings.label_smoothing,
            chosen_lengths=lengths("chosen_ids"),
            rejected_lengths=lengths("rejected_ids"),
        )


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
        require_made_from(self.path, tokens=tokens, model=(model, this_run.scratch.input_hashes[str(model)]))

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
    trust_remote_code = read_value("trust_remote_code", bool)
    runtime = read_runtime("train_dpo")
    processes = join_processes(runtime)
    train, held_out = (Pairs(tokens / f"{split}.arrow", ref_logprobs / f"{split}.arrow") for split in ("train", "eval"))
    train.require_reference_like(settings)
    require_tokens_of(tokens, model)
    outs = {"model": out, "metrics": metrics, "curve": curve}
    inputs = [tokens, ref_logprobs, model]
    declared = {"train_dpo": settings, "seed": seed, "trust_remote_code": trust_remote_code}
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
        best = BestWeights(settings.keep, is_main=processes.is_main)
        pair_loss = PairLoss(settings, micro_batching(runtime, end_and_pad_ids(model)[1], processes))
        this_run.say(f"train_dpo: {len(train)} pairs, {total} steps")
        for step in this_run.steps(total, engine=engine, best=best, budget=pair_loss.batching.budget):
            rows = rows_of_step(step, len(train), settings.batch_size, settings.epochs, seed)
            batch = train[rows]
            if step == 0:
                for pairs, path in ((batch, train.path), (held_out[: settings.batch_size], held_out.path)):
                    require_start(engine, pairs, pair_loss.batching, path, settings.precision)
            row = {"learning_rate": engine.learning_rate, **pair_loss(engine, batch, train=True)}
            require_finite(row["loss"], "loss", step)
            row["grad_norm"] = engine.step()
            if is_due(step + 1, settings.eval_every, total):
                with engine.averaged():
                    results = pair_loss(engine, held_out[:], train=False)
                    require_finite(results["loss"], "held-out loss", step)
                    best.offer(results, step + 1, lambda: lora.trained(engine.master_weights(language_model)))
                row |= {f"eval/{name}": value for name, value in results.items()}
            shown = ("loss", "rewards/margins", "rewards/accuracies", "eval/loss")
            this_run.record(step, tokens_in_pairs(batch), row, shown)
        with engine.averaged():
            weights = engine.master_weights(language_model)
            kept = best.choose(lambda: lora.trained(weights))
            results = {f"eval_{name.replace('/', '_')}": value for name, value in kept.results.items()}
            results |= {"train_rows": len(train), "eval_rows": len(held_out), "steps": total, "kept_step": kept.step}
            this_run.publish_model(
                language_model,
                processes.in_main(lambda: lora.merged(weights | kept.weights)),
                results | lora.counts(),
                save_dtype=settings.save_dtype,
                tokenizer_from=model,
                build_others=lambda staged: lora.save_adapter(kept.weights, staged["model"], settings.save_dtype),
            )
    processes.leave()


if __name__ == "__main__":
    run(main)
