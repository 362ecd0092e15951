"""The order of the test files: those that take minutes come first, so that none is left for one process alone.

Tests of properties draw the same examples in every run, and may take as long as a loaded machine needs.
"""

import pytest
from hypothesis import settings

from tests import loaded_python

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

LONG = (
    "tests/pipeline/test_repro.py",
    "tests/stages/test_equivalence.py",
    "tests/stages/test_kills.py",
    "tests/stages/test_launchers.py",
    "tests/stages/test_training.py",
    "tests/stages/test_lora.py",
    "tests/stages/test_trackers.py",
    "tests/stages/test_real_files.py",
    "tests/stages/test_hub.py",
    "tests/fuzz/test_fuzz.py",
    "tests/pipeline/test_staleness.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONG)))


def pytest_unconfigure() -> None:
    loaded_python.stop()
