"""Which entry of a section a script runs for: sections that map names to settings give one stage for each name."""

import os
from collections.abc import Collection
from typing import Annotated, Any

import typer

from stages.lib.command.errors import StageError
from stages.lib.command.params import PARAMS_FILE, Built, build, read_params
from stages.lib.command.quoted import nearest

EntryOption = Annotated[
    str | None,
    typer.Option("--name", help="Entry of the section in params.yaml; not needed under DVC, or if it has one."),
]


def read_entry(section: str, settings: type[Built], given: str | None) -> tuple[str, Built]:
    """The entry of a section that this process runs for: its name and its settings.

    Raises:
        StageError: as `read_params` and `entry_name`.
    """
    entries: dict[str, Any] = read_params(section, dict[str, Any])
    name = entry_name(given, entries, section)
    return name, build(settings, entries[name], f"{PARAMS_FILE}: {section}.{name}")


def entry_name(given: str | None, entries: Collection[str], section: str) -> str:
    """The entry asked for: `given`, or that of the stage which DVC runs ("train_dpo@dpo"), or the only one there is.

    No value or key of params.yaml may stand in a `cmd`, which a shell runs; so DVC says it by `$DVC_STAGE`.

    Raises:
        StageError: there is no such entry, or several and none was named.
    """
    name = given or os.environ.get("DVC_STAGE", "").partition("@")[2]
    if not name and len(entries) == 1:
        return next(iter(entries))
    if not name:
        found = f"has {', '.join(sorted(entries))}: say which with --name" if entries else "is empty"
        raise StageError(f"{PARAMS_FILE}: section '{section}' {found}")
    if name not in entries:
        known = f"known: {', '.join(sorted(entries))}" if entries else "it is empty"
        raise StageError(f"{PARAMS_FILE}: section '{section}' has no entry '{name}'{nearest(name, entries)}; {known}")
    return name
