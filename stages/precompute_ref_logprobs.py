"""Reference log-probs of preference pairs: Σ_t log π_ref(y_t | x, y_<t) for each completion, once and for all.

DPO then trains without a reference model in memory. The content of tokens and weights is the cache key (DVC's deps).

    python -m stages.precompute_ref_logprobs --tokens data/tokens/preference --model models/sft --out data/ref_logprobs
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.lib.errors import PathOption, StageError, asks_for_help, run
from stages.lib.hashing import dvc_hashes
from stages.lib.lora_settings import BaseQuantization
from stages.lib.outputs import written_whole
from stages.lib.params import read_params
from stages.lib.run_log import launcher_in_use, log_run
from stages.lib.runtime import read_runtime

if not asks_for_help():
    from stages.lib.batching import micro_batching
    from stages.lib.engine import frozen
    from stages.lib.pretrained import end_and_pad_ids, load_language_model
    from stages.lib.processes import join_processes
    from stages.lib.progress import Progress
    from stages.lib.sequence_logprobs import all_pair_logps
    from stages.lib.token_logprobs import TokenLogProbs
    from stages.lib.token_tables import PREFERENCE_SCHEMA, REFERENCE_SCHEMA, check_table_ids, read_table, write_table

ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class RefLogprobs:
    """Section `ref_logprobs` of params.yaml; the file explains each key."""

    precision: Literal["fp32", "bf16"]
    base_quantization: BaseQuantization


def main(tokens: PathOption, model: PathOption, out: PathOption) -> None:
    """Write the log-probs of the pairs in TOKENS under MODEL to OUT."""
    started = time.monotonic()
    settings = read_params("ref_logprobs", RefLogprobs)
    runtime = read_runtime("precompute_ref_logprobs")
    processes = join_processes(runtime)
    tables = {split: read_table(tokens / f"{split}.arrow", PREFERENCE_SCHEMA) for split in ("train", "eval")}
    where = (settings.precision, runtime, processes.device, settings.base_quantization)
    language_model = load_language_model(model, *where)
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
        for start in range(0, len(table), ROWS_AT_A_TIME):
            rows = range(start, min(start + ROWS_AT_A_TIME, len(table)))
            logps = all_pair_logps(module, table[rows], batching)
            chosen += logps.chosen.tolist()
            rejected += logps.rejected.tolist()
            require_numbers(chosen[start:] + rejected[start:], table["row"][rows.start : rows.stop], tokens / split)
            if processes.is_main:
                progress.update(rows.stop, len(rows), {})
        columns[split] = {
            "row": table["row"][:],
            "reference_chosen_logps": chosen,
            "reference_rejected_logps": rejected,
        }
    if processes.is_main:
        notes = {"precision": settings.precision, "base_quantization": str(settings.base_quantization)}
        schema = REFERENCE_SCHEMA.with_metadata(notes)
        with written_whole(out) as (partial,):
            partial.mkdir()
            for split, values in columns.items():
                write_table(partial / f"{split}.arrow", values, schema)
        log_run(
            "ref_logprobs",
            dvc_hashes([out]),
            time.monotonic() - started,
            runtime=runtime,
            processes=processes.world_size,
            device=str(processes.device),
            launcher=launcher_in_use(),
        )
    processes.leave()


def require_numbers(logps: list[float], rows: list[int], where: Path) -> None:
    """Raise a StageError that names the row if a log-prob is not finite. `logps`: of all chosen, then all rejected."""
    for place, value in enumerate(logps):
        if not math.isfinite(value):
            raise StageError(f"{where}, row {rows[place % len(rows)]}: its log-prob is {value}; the model is broken")


if __name__ == "__main__":
    run(main)
