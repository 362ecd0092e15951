"""Reference log-probs of preference pairs: Σ_t log π_ref(y_t | x, y_<t) for each completion, once and for all.

DPO then trains without a reference model in memory. The content of tokens and weights is the cache key (DVC's deps).

The reference is named in params.yaml. With `per_token` the log-prob of each token stands beside the sums.

    python -m stages.ref_logprobs --out data/ref_logprobs --name sft
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.errors import StageError
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.settings.ref_logprobs import RefLogprobs
from stages.lib.settings.runtime import read_runtime

if not asks_for_help():
    from stages.lib.compute.batching import MicroBatching, micro_batching
    from stages.lib.compute.frozen_model import frozen
    from stages.lib.compute.processes import join_processes
    from stages.lib.compute.sequence_logprobs import all_pair_logps, all_pair_token_logps
    from stages.lib.data.reference_tables import LOG_PROBS, MODEL_PATH, TOKEN_LOG_PROBS, VALUES, values_digest
    from stages.lib.data.token_tables import (
        PREFERENCE_SCHEMA,
        REFERENCE_SCHEMA,
        TOKEN_REFERENCE_SCHEMA,
        check_table_fits,
        read_table,
        write_table,
    )
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of, load_language_model
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.operations.progress import Progress
    from stages.lib.runs.model_card import shareable_path
    from stages.lib.runs.partial_results import NUMBER, NUMBERS, PartialResults


def main(out: PathOption, name: EntryOption = None) -> None:
    """Write the log-probs of pairs under a reference model."""
    name, settings = read_entry("ref_logprobs", RefLogprobs, name)
    model = Path(settings.model)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("ref_logprobs")
    processes = join_processes(runtime)
    paths = dict(zip(("train", "validation"), settings.tables("preference"), strict=True))
    tables = {split: read_table(path, PREFERENCE_SCHEMA) for split, path in paths.items()}
    for path in paths.values():
        require_tokens_of(path, model)
    declared = {f"ref_logprobs.{name}": settings, "trust_remote_code": trust_remote_code, "kernels": kernels}
    inputs, outs = [*paths.values(), model], {"logps": out / name}
    schema = TOKEN_REFERENCE_SCHEMA if settings.per_token else REFERENCE_SCHEMA
    holds = dict.fromkeys(LOG_PROBS, NUMBER) | (dict.fromkeys(TOKEN_LOG_PROBS, NUMBERS) if settings.per_token else {})
    with PartialResults(f"ref_logprobs@{name}", declared, inputs, outs, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        loading = Loading(
            settings.precision,
            runtime,
            processes.device,
            settings.base_quantization,
            frozen=True,
            trust_remote_code=trust_remote_code,
        )
        language_model = load_language_model(model, loading)
        module = frozen(TokenLogProbs(language_model, chunk_tokens=runtime.logits_chunk_tokens), runtime, processes)
        batching = micro_batching(runtime, end_and_pad_ids(model)[1], processes, language_model)
        columns = {}
        for split, table in tables.items():
            check_table_fits(table, facts_of(language_model), paths[split])
            progress = Progress(f"{this_run.stage} {split}", len(table), runtime.log_seconds, unit="rows")
            columns[split] = {name: [] for name in holds}
            for rows in this_run.chunks(len(table)):
                compute = partial(all_logps, module, table, rows, paths[split], batching, settings.per_token)
                kept = this_run.keep(f"{split}-{rows.start}-{rows.stop}", len(rows), holds, compute)
                for name, values in kept.items():
                    # Lists of Python's numbers would take eight times the room.
                    columns[split][name] += map(as_float32, values) if holds[name] == NUMBERS else values
                if processes.is_main:
                    progress.update(rows.stop, len(rows), {})

        def build(staged: dict[str, Path]) -> None:
            hashes = this_run.own_scratch.input_hashes
            staged["logps"].mkdir()
            notes = {"precision": settings.precision, "base_quantization": str(settings.base_quantization)}
            notes |= {"model": hashes[str(model)], MODEL_PATH: shareable_path(settings.model)}
            for split, values in columns.items():
                flat = [np.concatenate(values[name]) if holds[name] == NUMBERS else values[name] for name in holds]
                of_split = {"tokens": hashes[str(paths[split])], VALUES: values_digest(*flat)}
                table = {"row": tables[split]["row"][:], **values}
                write_table(staged["logps"] / f"{split}.arrow", table, schema.with_metadata(notes | of_split))

        this_run.publish(build)
    processes.leave()


def all_logps(
    module: Callable, table: Any, rows: range, where: Path, batching: MicroBatching, per_token: bool
) -> dict[str, list]:
    """The log-probs of the replies of some rows, by column of the table, computed by all processes together."""
    if per_token:
        sums, *tokens = all_pair_token_logps(module, table[rows], batching)
    else:
        sums, tokens = all_pair_logps(module, table[rows], batching), ()
    of_replies = [values.tolist() for values in sums]
    require_numbers([*of_replies[0], *of_replies[1]], table["row"][rows.start : rows.stop], where)
    return {
        **dict(zip(LOG_PROBS, of_replies, strict=True)),
        **(dict(zip(TOKEN_LOG_PROBS, tokens, strict=True)) if per_token else {}),
    }


def as_float32(values: list[float]) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def require_numbers(logps: list[float], rows: list[int], where: Path) -> None:
    """Raise a StageError that names the row if one is no log-prob. `logps`: of all chosen, then of all rejected."""
    for place, value in enumerate(logps):
        if not -math.inf < value <= 0:
            raise StageError(f"{where}, row {rows[place % len(rows)]}: its log-prob is {value}; the model is broken")


if __name__ == "__main__":
    run(main)
