"""The commit that a table was measured at."""

import subprocess

from tests.stages.tiny_pipeline import PROJECT


def measured_commit() -> str:
    """The commit of the project, and whether code in stages/ differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "stages") else "")
