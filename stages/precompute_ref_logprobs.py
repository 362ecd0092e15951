"""Reference log-probs of preference pairs: Σ_t log π_ref(y_t | x, y_<t) for each completion, once and for all.

DPO then trains without a reference model in memory. The content of tokens and weights is the cache key (DVC's deps).

    python -m stages.precompute_ref_logprobs --tokens data/tokens/preference --model models/sft --out data/ref_logprobs
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stages.lib.errors import PathOption, StageError, asks_for_help, run
from stages.lib.params import read_params
from stages.lib.settings.ref_logprobs import RefLogprobs
from stages.lib.settings.runtime import read_runtime

if not asks_for_help():
    from stages.lib.batching import MicroBatching, micro_batching
    from stages.lib.frozen_model import frozen
    from stages.lib.partial_results import PartialResults
    from stages.lib.pretrained import end_and_pad_ids, load_language_model
    from stages.lib.processes import join_processes
    from stages.lib.progress import Progress
    from stages.lib.sequence_logprobs import all_pair_logps
    from stages.lib.token_logprobs import TokenLogProbs
    from stages.lib.token_tables import PREFERENCE_SCHEMA, REFERENCE_SCHEMA, check_table_ids, read_table, write_table


def main(tokens: PathOption, model: PathOption, out: PathOption) -> None:
    """Write the log-probs of the pairs in TOKENS under MODEL to OUT."""
    settings = read_params("ref_logprobs", RefLogprobs)
    runtime = read_runtime("ref_logprobs")
    processes = join_processes(runtime)
    tables = {split: read_table(tokens / f"{split}.arrow", PREFERENCE_SCHEMA) for split in ("train", "eval")}
    declared = {"ref_logprobs": settings}
    with PartialResults("ref_logprobs", declared, [tokens, model], {"logps": out}, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        where = (settings.precision, runtime, processes.device, settings.base_quantization)
        language_model = load_language_model(model, *where, frozen=True)
        module = frozen(TokenLogProbs(language_model, chunk_tokens=runtime.logits_chunk_tokens), runtime, processes)
        batching = micro_batching(runtime, end_and_pad_ids(model)[1], processes)
        columns = {}
        for split, table in tables.items():
            check_table_ids(
                table,
                ("prompt_ids", "chosen_ids", "rejected_ids"),
                language_model.config.vocab_size,
                tokens / f"{split}.arrow",
            )
            progress = Progress(f"ref_logprobs {split}", len(table), runtime.log_seconds, unit="rows")
            chosen, rejected = [], []
            for rows in this_run.chunks(len(table)):
                compute = partial(all_logps, module, table, rows, tokens / split, batching)
                both = this_run.keep(f"{split}-{rows.start}-{rows.stop}", compute)
                chosen += both["chosen"]
                rejected += both["rejected"]
                if processes.is_main:
                    progress.update(rows.stop, len(rows), {})
            columns[split] = {
                "row": table["row"][:],
                "reference_chosen_logps": chosen,
                "reference_rejected_logps": rejected,
            }

        def build(staged: dict[str, Path]) -> None:
            staged["logps"].mkdir()
            notes = {"precision": settings.precision, "base_quantization": str(settings.base_quantization)}
            schema = REFERENCE_SCHEMA.with_metadata(notes)
            for split, values in columns.items():
                write_table(staged["logps"] / f"{split}.arrow", values, schema)

        this_run.publish(build)
    processes.leave()


def all_logps(module: Callable, table: Any, rows: range, where: Path, batching: MicroBatching) -> dict[str, list]:
    """The log-probs of the `chosen` and of the `rejected` replies of some rows, computed by all processes together."""
    logps = all_pair_logps(module, table[rows], batching)
    both = {name: values.tolist() for name, values in logps._asdict().items()}
    require_numbers(both["chosen"] + both["rejected"], table["row"][rows.start : rows.stop], where)
    return both


def require_numbers(logps: list[float], rows: list[int], where: Path) -> None:
    """Raise a StageError that names the row if a log-prob is not finite. `logps`: of all chosen, then all rejected."""
    for place, value in enumerate(logps):
        if not math.isfinite(value):
            raise StageError(f"{where}, row {rows[place % len(rows)]}: its log-prob is {value}; the model is broken")


if __name__ == "__main__":
    run(main)
