"""Reference log-probs of replies: Σ_t log π_ref(y_t | x, y_<t) for each completion, once and for all.

DPO, KTO and their like then train without a reference model in memory. The content of tokens and weights is the cache
key (DVC's deps).

The reference is named in params.yaml: in the section `ref_logprobs` for pairs, where with `per_token` the log-prob of
each token stands beside the sums, and in `ref_logprobs_unpaired` for single replies, beside those to other prompts.

    python -m stages.ref_logprobs --out data/ref_logprobs --name sft
    python -m stages.ref_logprobs --kind unpaired --out data/ref_logprobs_unpaired --name sft
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow
import typer

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.errors import StageError
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.settings.ref_logprobs import RefLogprobs, RefLogprobsUnpaired
from stages.lib.settings.runtime import read_runtime

if not asks_for_help():
    from stages.lib.compute.batching import MicroBatching, micro_batching
    from stages.lib.compute.frozen_model import frozen
    from stages.lib.compute.processes import join_processes
    from stages.lib.compute.sequence_logprobs import all_pair_logps, all_pair_token_logps, all_response_logps
    from stages.lib.data.reference_tables import (
        LOG_PROBS,
        MODEL_PATH,
        TOKEN_LOG_PROBS,
        UNPAIRED_LOG_PROBS,
        VALUES,
        values_digest,
    )
    from stages.lib.data.token_tables import (
        PREFERENCE_SCHEMA,
        REFERENCE_SCHEMA,
        TOKEN_REFERENCE_SCHEMA,
        UNPAIRED_REFERENCE_SCHEMA,
        UNPAIRED_SCHEMA,
        check_table_fits,
        read_table,
        write_table,
    )
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of, load_language_model
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.operations.progress import Progress
    from stages.lib.runs.model_card import shareable_path
    from stages.lib.runs.partial_results import NUMBER, NUMBER_OR_NULL, NUMBERS, PartialResults

KindOption = Annotated[
    Literal["preference", "unpaired"], typer.Option("--kind", help="What the rows are: pairs, or single replies.")
]


class Replies(NamedTuple):
    """Whose log-probs a table gets."""

    kind: str  # of the token tables
    tokens: pyarrow.Schema
    schema: pyarrow.Schema  # of what is written
    logps: Callable[[Callable, dict[str, list], MicroBatching], dict[str, list]]  # of some rows, by column of `schema`

    @property
    def holds(self) -> dict[str, str]:
        """What a column of `schema` holds, as partial results are to be checked."""
        kinds = {
            name: NUMBERS if pyarrow.types.is_list(self.schema.field(name).type) else NUMBER for name in self.names
        }
        return kinds | {name: NUMBER_OR_NULL for name in kinds if name == UNPAIRED_LOG_PROBS[1]}

    @property
    def names(self) -> list[str]:
        """The columns with log-probs."""
        return [name for name in self.schema.names if name != "row"]


def paired_replies(per_token: bool) -> Replies:
    """The chosen and the rejected replies."""
    if per_token:
        return Replies("preference", PREFERENCE_SCHEMA, TOKEN_REFERENCE_SCHEMA, pair_token_columns)
    return Replies("preference", PREFERENCE_SCHEMA, REFERENCE_SCHEMA, pair_columns)


def unpaired_replies(mismatched: bool) -> Replies:
    """The replies, and those to other prompts."""
    columns = partial(reply_columns, mismatched)
    return Replies("unpaired", UNPAIRED_SCHEMA, UNPAIRED_REFERENCE_SCHEMA, columns)


def main(out: PathOption, kind: KindOption = "preference", name: EntryOption = None) -> None:
    """Write the log-probs of the replies in token tables under a reference model."""
    if kind == "unpaired":
        section, (name, settings) = (
            "ref_logprobs_unpaired",
            read_entry("ref_logprobs_unpaired", RefLogprobsUnpaired, name),
        )
        replies = unpaired_replies(settings.mismatched)
    else:
        section, (name, settings) = "ref_logprobs", read_entry("ref_logprobs", RefLogprobs, name)
        replies = paired_replies(settings.per_token)
    model = Path(settings.model)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime(section)
    processes = join_processes(runtime)
    paths = dict(zip(("train", "validation"), settings.tables(replies.kind), strict=True))
    tables = {split: read_table(path, replies.tokens) for split, path in paths.items()}
    for path in paths.values():
        require_tokens_of(path, model)
    declared = {f"{section}.{name}": settings, "trust_remote_code": trust_remote_code, "kernels": kernels}
    inputs, outs = [*paths.values(), model], {"logps": out / name}
    with PartialResults(f"{section}@{name}", declared, inputs, outs, runtime, processes) as this_run:
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
            columns[split] = all_columns(this_run, split, table, paths[split], replies, module, batching)

        def build(staged: dict[str, Path]) -> None:
            hashes = this_run.own_scratch.input_hashes
            staged["logps"].mkdir()
            notes = {"precision": settings.precision, "base_quantization": str(settings.base_quantization)}
            notes |= {"model": hashes[str(model)], MODEL_PATH: shareable_path(settings.model)}
            for split, values in columns.items():
                flat = [np.concatenate(values[name]) if name in TOKEN_LOG_PROBS else values[name] for name in values]
                of_split = {"tokens": hashes[str(paths[split])], VALUES: values_digest(*flat)}
                table = {"row": tables[split]["row"][:], **values}
                write_table(staged["logps"] / f"{split}.arrow", table, replies.schema.with_metadata(notes | of_split))

        this_run.publish(build)
    processes.leave()


def all_columns(
    this_run: PartialResults,
    split: str,
    table: Any,
    where: Path,
    replies: Replies,
    module: Callable,
    batching: MicroBatching,
) -> dict[str, list]:
    """The columns of a split, kept chunk by chunk; all processes compute each chunk together."""
    progress = Progress(f"{this_run.stage} {split}", len(table), this_run.runtime.log_seconds, unit="rows")
    columns: dict[str, list] = {name: [] for name in replies.names}
    for rows in this_run.chunks(len(table)):
        compute = partial(checked_logps, replies, module, table, rows, where, batching)
        kept = this_run.keep(f"{split}-{rows.start}-{rows.stop}", len(rows), replies.holds, compute)
        for name, values in kept.items():
            # Lists of Python's numbers would take eight times the room.
            columns[name] += map(as_float32, values) if name in TOKEN_LOG_PROBS else values
        if this_run.processes.is_main:
            progress.update(rows.stop, len(rows), {})
    return columns


def checked_logps(
    replies: Replies, module: Callable, table: Any, rows: range, where: Path, batching: MicroBatching
) -> dict[str, list]:
    """The log-probs of some rows, by column. Raises StageError that names the row if the sum over a reply is none."""
    columns = replies.logps(module, table[rows], batching)
    for name in {*columns} - {*TOKEN_LOG_PROBS}:
        for row, value in zip(table["row"][rows.start : rows.stop], columns[name], strict=True):
            if value is not None and not -math.inf < value <= 0:
                raise StageError(f"{where}, row {row}: its log-prob is {value}; the model is broken")
    return columns


def pair_columns(module: Callable, rows: dict[str, list], batching: MicroBatching) -> dict[str, list]:
    sums = all_pair_logps(module, rows, batching)
    return dict(zip(LOG_PROBS, (values.tolist() for values in sums), strict=True))


def pair_token_columns(module: Callable, rows: dict[str, list], batching: MicroBatching) -> dict[str, list]:
    sums, *tokens = all_pair_token_logps(module, rows, batching)
    columns = dict(zip(LOG_PROBS, (values.tolist() for values in sums), strict=True))
    return columns | dict(zip(TOKEN_LOG_PROBS, tokens, strict=True))


def reply_columns(
    mismatched: bool, module: Callable, rows: dict[str, list], batching: MicroBatching
) -> dict[str, list]:
    own, others = UNPAIRED_LOG_PROBS
    logps: dict[str, list] = {
        own: all_response_logps(module, rows["prompt_ids"], rows["completion_ids"], batching).tolist(),
        others: [None] * len(rows["row"]),
    }
    places = [place for place, ids in enumerate(rows["mismatched_ids"]) if mismatched and ids is not None]
    prompts, replies = ([rows[name][place] for place in places] for name in ("prompt_ids", "mismatched_ids"))
    found = all_response_logps(module, prompts, replies, batching).tolist() if places else []
    for place, value in zip(places, found, strict=True):
        logps[others][place] = value
    return logps


def as_float32(values: list[float]) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


if __name__ == "__main__":
    run(main)
