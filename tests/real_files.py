"""Real data and models for tests, from a folder outside the project; a test that needs one skips without it."""

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


def real_file(name: str) -> Path:
    """A file or folder below $STAGEWISE_SHARED (default ../shared, seen from the project), or skip the test."""
    folder = PROJECT / os.environ.get("STAGEWISE_SHARED", "../shared")
    if not (folder / name).exists():
        pytest.skip(f"{name} is not in {folder}: set STAGEWISE_SHARED to the folder that holds it")
    return folder / name
