"""Test rows are for the evaluation alone: no training stage depends on them, and editing them makes none stale."""

from pathlib import Path

from tests.pipeline.graph import all_instances, is_at_or_below, load_graph, outs_of, paths
from tests.stages.data_stages import sources_of, write_rows
from tests.stages.test_read_source import pair
from tests.stages.tiny_pipeline import call, change, new_project, read_yaml, write_yaml

OF_TEST_ROWS = ("data/prepared/test", "data/tokens/test")
TOKENS = ("tokenize_data@sft", "tokenize_data@preference", "tokenize_data@prompts")


def depends_on(stages: dict[str, dict], deps: list[str]) -> set[str]:
    """The stages with a dep at, below or above one of these paths, and those behind their outs, but for tokenizing."""
    found: set[str] = set()
    waiting = list(deps)
    while waiting:
        path = waiting.pop()
        for name, stage in stages.items():
            touched = any(is_at_or_below(dep, path) or is_at_or_below(path, dep) for dep in paths(stage["deps"]))
            if touched and name not in found and not name.startswith("tokenize_data"):
                found.add(name)
                waiting += outs_of(stage)
    return found


def test_only_evaluations_and_the_report_are_behind_the_test_rows():
    stages = all_instances(load_graph())
    behind = {name.partition("@")[0] for name in depends_on(stages, [*OF_TEST_ROWS])}
    assert "evaluate" in behind
    assert behind <= {"evaluate", "evaluate_rm", "score_samples", "report"}


def hashes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("data/*/*/*") if file.is_file()}


def test_edited_test_rows_change_the_files_of_the_test_split_alone(tmp_path: Path) -> None:
    """The files of the other splits keep their bytes, and so the hashes by which DVC takes a stage for stale."""
    folder = new_project(tmp_path)
    rows = [pair(f"what is {n}?", f"{n} it is.", "no.") for n in range(40)]
    tests = [pair(f"and {n}?", f"{n} it is.", "no.") for n in range(10)]
    kinds = ["sft", "preference", "prompts"]
    files = {
        "own": {"path": write_rows(folder / "data/raw/own.jsonl", rows), "kinds": kinds},
        "bench": {"path": write_rows(folder / "data/raw/bench.jsonl", tests), "kinds": kinds, "split": "test"},
    }
    params = read_yaml(folder / "params.yaml") | {"sources": sources_of(files=files)}
    write_yaml(folder / "params.yaml", params)
    change(folder / "params.yaml", {"prepare_data": {"test_fraction": 0.0}})
    for stage in ("read_source@own", "read_source@bench", "prepare_data", "prepare_base@base", *TOKENS):
        call(folder, stage)
    before = hashes(folder)
    write_rows(folder / "data/raw/bench.jsonl", [*tests[3:], pair("what else?", "all else.", "no.")])
    for stage in ("read_source@bench", "prepare_data", *TOKENS):
        call(folder, stage)
    after = hashes(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    kept = {f"data/{made}/{split}" for made in ("prepared", "tokens") for split in ("train", "validation")}
    assert not [name for name in changed if name.startswith(tuple(kept))]
    assert {f"data/tokens/test/{kind}.arrow" for kind in kinds} <= changed
