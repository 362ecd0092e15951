"""Packages that a library would import for what no stage asks of it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def spared(name: str) -> Iterator[None]:
    """Let libraries that ask within it whether a package is there hear no, unless it is in use already.

    So accelerate spares DeepSpeed, with which it would see whether a model that is saved is wrapped in its engine.
    """
    if name in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules[name] = None  # what Python takes for "not there"
    try:
        yield
    finally:
        if modules.get(name) is None:
            del modules[name]
