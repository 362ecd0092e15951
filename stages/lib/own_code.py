"""The code that a stage runs: its script and every module of `stages` that it imports, now or later."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.lib.hashing import combined_hash, file_hash

PROJECT = Path(__file__).resolve().parents[2]
# By text: parsing all of it would take a quarter of a second of each start.
_IMPORT = re.compile(r"^ *(?:from|import) +(stages[\w.]*)(?: +import +(\([^)]*\)|[^\n]*))?", re.MULTILINE)


def code_hash() -> str:
    """Hash of the code of the stage that this process runs."""
    return combined_hash(file_hash(file) for file in code_files())


def code_files() -> list[Path]:
    """Files of the modules of `stages` in this process, and of those that they import inside functions, sorted.

    Whether such a late import (of DeepSpeed's engine, say) has happened yet makes no difference.
    """
    loaded = [module for name, module in list(sys.modules.items()) if _is_ours(name, module)]
    found: set[Path] = set()
    pending = [Path(module.__file__).resolve() for module in loaded]
    while pending:
        file = pending.pop()
        if file not in found:
            found.add(file)
            pending += _imported_files(file)
    return sorted(found)


def _is_ours(name: str, module: Any) -> bool:
    spec = getattr(module, "__spec__", None)
    is_stage = name == "__main__" and spec is not None and spec.name.startswith("stages.")
    return (is_stage or name.startswith("stages.")) and bool(getattr(module, "__file__", None))


def _imported_files(file: Path) -> Iterator[Path]:
    for package, names in _IMPORT.findall(file.read_text("utf-8")):
        for name in [package, *(f"{package}.{part}" for part in re.findall(r"\w+", names))]:
            path = PROJECT / f"{name.replace('.', '/')}.py"
            if path.is_file():
                yield path
