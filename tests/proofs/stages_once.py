"""Stages of a project one after the other, each in a process of its own; what has finished is not run again."""

from collections.abc import Iterable
from pathlib import Path

from tests.stages.tiny_pipeline import start


def run_once(project: Path, stages: Iterable[str], environment: dict[str, str] | None = None) -> None:
    """Run those that an earlier call has not finished. The program ends with what a stage said if it fails."""
    for stage in stages:
        done = project / "done" / stage
        if done.exists():
            continue
        process = start(project, stage, base_environment=environment)
        told, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{stage} in {project} failed:\n{told[-2000:]}{errors[-2000:]}")
        done.parent.mkdir(exist_ok=True)
        done.touch()
        print(f"{project.name}: {stage}: {(told.splitlines() or [''])[-1]}", flush=True)
