"""Where an out came from: every stage behind it, back to the raw data and the base model, as `dvc.lock` records it.

    python -m stages.tools.show_lineage models/ppo            the chain, and whether the workspace is as recorded
    python -m stages.tools.show_lineage models/ppo --json     the same for a program

Hashes are DVC's (MD5), of what the stage read and wrote when it ran; all of it is read again and compared. How a stage
ran (launcher, runtime, versions) is in no hash: it comes from the log of runs, if the run was here. The exit code is 1
if something here is not what `dvc.lock` records; what is not here at all (a fresh clone has no models) is only said.
"""

import json
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.lib.command.run import run
from stages.tools.lineage import SAME, Lock, Record, as_yaml, dotted, trace

WIDTH = 120
SHORT = 8  # digits of a hash
FIRST_LINE = 12  # where the text of a field begins
NOT_AS_RECORDED = 1
NO_BREAK = "\N{NO-BREAK SPACE}"
NO_RUN = "not known: no record of that run here"


def file_and_hash(entry: Record) -> str:
    """A file with its hash as recorded, and its state if that is not what is here."""
    state = "" if entry["state"] == SAME else f" ({entry['state'].upper()})"
    return kept_together(f"{entry['path']} {(entry['md5'] or '?')[:SHORT]}{state}")


def kept_together(text: str) -> str:
    """A text that no line ends within."""
    return text.replace(" ", NO_BREAK)


def keys_and_values(values: Mapping[str, Any]) -> str:
    return ", ".join(kept_together(f"{key} {as_yaml(value)}") for key, value in values.items())


def of_code(entries: Iterable[Record] | None) -> str:
    if entries is None:
        return "not recorded"
    return ", ".join(file_and_hash({**entry, "path": entry["path"].removeprefix("stages/")}) for entry in entries)


def of_params(params: Mapping[str, Any]) -> str:
    """Settings by section: `seed 17; train_rm: epochs 1.0, batch_size 32`."""
    sections = []
    for name, value in sorted(params.items(), key=lambda item: isinstance(item[1], dict)):
        below = dotted(value) if isinstance(value, dict) else {}
        sections.append(f"{name}: {keys_and_values(below)}" if below else f"{name} {as_yaml(value)}")
    return "; ".join(sections) or "none"


def of_run(record: Record | None) -> dict[str, str]:
    if record is None:
        return {"run": NO_RUN}
    count = record["processes"]
    runtime = record["runtime"]
    return {
        "run": f"{record['ended']}, {record['seconds']} s, {record['peak_memory_mib']} MiB, "
        f"{count} process{'es' if count > 1 else ''} on {record['device']}",
        "launcher": record["launcher"],
        "runtime": keys_and_values(dotted(runtime)) if runtime else "none",
        "versions": keys_and_values({"python": record["python"], **record["versions"]}),
    }


def fields_of(stage: Record, taken: set[str]) -> dict[str, str]:
    others = [entry for entry in stage["outs"] if entry["path"] not in taken]
    return {
        **({"also made": ", ".join(map(file_and_hash, others))} if others else {}),
        "params": of_params(stage["params"]),
        "code": f"in stages/: {of_code(stage['code'])}",
        **({"source": stage["origin"]} if stage["origin"] else {}),
        **of_run(stage["run"]),
    }


def wrapped(name: str, text: str, indent: str) -> list[str]:
    """A field of a stage: its name, and beside it the text on as many lines as it needs."""
    return wrapped_after(f"{indent}{name:{FIRST_LINE}}", f"{indent}{'':{FIRST_LINE}}", text)


def wrapped_after(first: str, others: str, text: str) -> list[str]:
    """Lines of `text`, the first one behind `first` and the rest behind `others`."""
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(NO_BREAK, " ") for line in lines]


class Tree:
    """The chain as lines: each stage once in full, below what was made from it; later only its name."""

    def __init__(self, stages: Mapping[str, Record]) -> None:
        self.stages = stages
        self.done: set[str] = set()
        self.lines: list[str] = []

    def add(self, name: str, taken: list[Record], indent: str = "", *, last: bool = True, root: bool = False) -> None:
        """Add a stage as the maker of the files `taken`, and all that it was made from below it."""
        branch, below = ("", "") if root else ("└─ ", "   ") if last else ("├─ ", "│  ")
        again = " (see above)" if name in self.done else ""
        files = ", ".join(map(file_and_hash, taken))
        self.lines += wrapped_after(f"{indent}{branch}{name}{again} → ", f"{indent}{below}{'':{FIRST_LINE}}", files)
        if again:
            return
        self.done.add(name)
        groups = self.inputs_by_maker(name)
        bar = "│  " if groups else "   "
        for field, text in fields_of(self.stages[name], {entry["path"] for entry in taken}).items():
            self.lines += wrapped(field, text, f"{indent}{below}{bar}")
        for number, (maker, entries) in enumerate(groups):
            final = number == len(groups) - 1
            if maker is None:
                branches = ["├─"] * (len(entries) - 1) + ["└─" if final else "├─"]
                for corner, entry in zip(branches, entries, strict=True):
                    unrecorded = entry["unrecorded_maker"]
                    made_by = f"{unrecorded}, of which dvc.lock has no run" if unrecorded else "no stage"
                    text = f"{file_and_hash(entry)}, made by {made_by}"
                    self.lines += wrapped_after(f"{indent}{below}{corner} ", f"{indent}{below}   ", text)
            else:
                self.add(maker, entries, f"{indent}{below}", last=final)

    def inputs_by_maker(self, name: str) -> list[tuple[str | None, list[Record]]]:
        groups: dict[str | None, list[Record]] = {}
        for entry in self.stages[name]["inputs"]:
            groups.setdefault(entry["made_by"], []).append(entry)
        return list(groups.items())


def as_text(record: Record) -> str:
    tree = Tree(record["stages"])
    for path in record["asked"]:
        name, entry = next(
            (name, entry)
            for name, stage in record["stages"].items()
            for entry in stage["outs"]
            if entry["path"] == path
        )
        tree.add(name, [entry], root=True)
        tree.lines.append("")
    return "\n".join([*tree.lines, *conclusion(record)])


def conclusion(record: Record) -> list[str]:
    """What was compared, and what of it is not as recorded."""
    files = {
        entry["path"]
        for stage in record["stages"].values()
        for part in ("code", "inputs", "outs")
        for entry in stage[part] or ()
    }
    lines = [
        f"Compared with dvc.lock: {len(files)} files and folders, and the settings of {len(record['stages'])} stages."
    ]
    if record["altered"]:
        remedy = "`dvc checkout PATH` brings back what was recorded; `git checkout PATH` does in metrics/"
        lines += [f"Altered ({remedy}):", *bullets(record["altered"])]
    if record["older"]:
        lines += ["dvc.lock is older than the workspace (`dvc repro` brings it up to date):", *bullets(record["older"])]
    if record["missing"]:
        lines += ["Not here, so not compared:", *bullets(record["missing"])]
    if not record["altered"] and not record["older"]:
        lines.append("All that is here is as recorded.")
    return lines


def bullets(texts: Iterable[str]) -> list[str]:
    return [f"  - {text}" for text in texts]


def main(
    paths: Annotated[list[Path] | None, typer.Argument(help="Outs of stages; all models if none is named.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object, hashes in full.")] = False,
) -> None:
    """Say where PATHS came from, and whether they and all behind them are as `dvc.lock` records."""
    lock = Lock()
    asked = [lock.asked_for(path) for path in paths] if paths else lock.models()
    record = trace(lock, dict.fromkeys(asked))
    print(json.dumps(record, indent=2) if as_json else as_text(record))
    if record["altered"] or record["older"]:
        sys.exit(NOT_AS_RECORDED)


if __name__ == "__main__":
    run(main)
