"""The stages of data in a folder of their own, run in this process, with sources and settings given as far as they
differ from the defaults."""

import json
from pathlib import Path
from typing import Any

from stages import prepare_data, read_source
from stages.lib.data.prepared_rows import SPLITS
from stages.lib.settings.declaration import block
from stages.lib.settings.prepare_data import PrepareData
from stages.lib.settings.sources import FileSource, HubSource, Sources
from stages.lib.settings.task_sources import ArithmeticSettings, FilmReviewSettings
from tests.stages.tiny_pipeline import inside, read_yaml, write_yaml

MODELS = {"files": FileSource, "hub": HubSource, "tasks": FilmReviewSettings, "arithmetic": ArithmeticSettings}
HALF = {"validation_fraction": 0.25, "test_fraction": 0.25}


def sources_of(**groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The section `sources`: of each group the sources by name, each with what differs from its defaults."""
    given = {
        group: {name: block(MODELS[group], **keys) for name, keys in of_name.items()}
        for group, of_name in groups.items()
    }
    return block(Sources, **({"tasks": {}} | given))


def use_source(folder: Path, source: dict[str, Any], name: str = "mine") -> None:
    """Make one source of files the only one of a project."""
    params = read_yaml(folder / "params.yaml")
    params["sources"] = sources_of(files={name: source})
    write_yaml(folder / "params.yaml", params)


def settings(folder: Path, sources: dict[str, Any], seed: int = 17, **changed: Any) -> None:
    """Write params.yaml; `changed` are keys of prepare_data."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"seed": seed, "sources": sources, "prepare_data": block(PrepareData, **changed)}
    (folder / "params.yaml").write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML too


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write JSON lines; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(folder: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, float], str]:
    """Run read_source. Returns its rows, its metrics and its record."""
    with inside(folder):
        read_source.main(Path("data/sources"), Path("metrics/read_source"), name)
    record = folder / f"metrics/read_source/{name}"
    values = json.loads(record.with_suffix(".json").read_text(encoding="utf-8"))
    return lines(folder / f"data/sources/{name}/rows.jsonl"), values, record.with_suffix(".txt").read_text("utf-8")


def prepare(folder: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """Run prepare_data on the rows that were read. Returns the rows by 'split/kind', and the metrics."""
    with inside(folder):
        prepare_data.main(Path("data/sources"), Path("data/prepared"), Path("metrics/prepare_data.json"))
    files = sorted((folder / "data/prepared").glob("*/*.jsonl"))
    assert {file.parent.name for file in files} == set(SPLITS)
    rows = {f"{file.parent.name}/{file.stem}": lines(file) for file in files}
    return rows, json.loads((folder / "metrics/prepare_data.json").read_text(encoding="utf-8"))


def read_and_prepare(
    folder: Path, sources: dict[str, Any], **changed: Any
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """Both stages, of all sources."""
    settings(folder, sources, **changed)
    for group in sources.values():
        for name in group:
            read(folder, name)
    return prepare(folder)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_rows(rows: dict[str, list[dict[str, Any]]], kind: str) -> list[dict[str, Any]]:
    """The rows of a kind in all splits."""
    return [row for split in SPLITS for row in rows[f"{split}/{kind}"]]


def bytes_below(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
