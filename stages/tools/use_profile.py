"""Write params.yaml from a profile: the default settings, with the profile's own values laid over them.

    python -m stages.tools.use_profile --profile profiles/hh-local.yaml
    python -m stages.tools.use_profile --profile profiles/default.yaml

A profile lists its changes to the defaults that the settings declare (`make explain`); `default` needs no file, since
it changes nothing. Where names stand (sources, models, what is trained), a section of a profile lists all of them: `{}`
is none. A name that the default run has keeps its settings there, another one starts from the defaults of its keys.

The result never depends on what params.yaml happened to hold before, comments included. Settings that were edited in
params.yaml itself, and so stand in no profile, are not overwritten unless asked to.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.lib.command.errors import StageError
from stages.lib.command.json_schema import KIND, Declared, of_any_name
from stages.lib.command.outputs import written_whole
from stages.lib.command.params import PARAMS_FILE
from stages.lib.command.quoted import nearest
from stages.lib.command.run import run
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.settings.schemas import params_schema
from stages.lib.settings.sections import build_all, default_params
from stages.tools.params_text import params_text

DEFAULT = "default"
ABSENT = object()


def settings_of(profile: Path) -> dict[str, Any]:
    """The default settings with those of `profile`. Raises StageError if it is missing, or no run could use them."""
    if profile.stem == DEFAULT:
        if profile.exists():
            raise StageError(f"{profile}: the defaults are those that the settings declare; give it another name")
        return default_params()
    if not profile.is_file():
        known = [DEFAULT, *sorted(path.stem for path in profile.parent.glob("*.yaml"))]
        raise StageError(f"{profile} is missing{nearest(profile.stem, known)}; the profiles are: {', '.join(known)}")
    settings = merged(default_params(), load_yaml(profile), declared_params())
    build_all(settings, profile)
    return settings


def declared_params() -> Declared:
    return Declared.top(params_schema())


def merged(default: Any, values: Any, declared: Declared) -> Any:
    """`values` over `default`, block by block; other names, or another type, replace those there.

    What a profile leaves out of a new name or type has the default that its key declares.
    """
    is_mapping = isinstance(default, dict) and isinstance(values, dict)
    if not is_mapping or not (declared.entry or declared.keys):  # a mapping of names to plain values is replaced
        return values
    if of_any_name(declared.node):
        entry = declared.entry
        usual = {name: entry.narrowed(value).defaults if entry else None for name, value in values.items()}
        own = {name: deepcopy(default.get(name, usual[name])) for name in values}  # or two names would share blocks
        return {name: merged(own[name], value, declared.below(name)) for name, value in values.items()}
    if values.get(KIND, default.get(KIND)) != default.get(KIND):
        default = declared.narrowed(values).defaults
    declared = declared.narrowed(default | values)
    return default | {name: merged(default.get(name), value, declared.below(name)) for name, value in values.items()}


def refuse_to_drop_edits(params: Path, folder: Path, wanted: dict[str, Any]) -> None:
    """Raise StageError if `params` holds what no profile gives, naming the keys that would be lost."""
    held = load_yaml(params)
    known = dict(settings_of_profiles(folder))
    if held in (*known.values(), wanted):
        return
    lost = {name: differing(flat(held), flat(settings)) for name, settings in known.items()}
    closest = min(lost, key=lambda name: len(lost[name]))
    raise StageError(
        f"{params} was edited and would be overwritten; against profile {closest} it differs in: "
        f"{', '.join(lost[closest])}. Keep the edits as a profile of your own (those keys in profiles/NAME.yaml), or "
        "drop them: make use PROFILE=... FORCE=1 (--drop-edits)"
    )


def settings_of_profiles(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of each profile; one that is broken could not have been in use."""
    yield DEFAULT, default_params()
    for profile in sorted(folder.glob("*.yaml")):
        try:
            yield profile.stem, settings_of(profile)
        except StageError:
            continue


def flat(values: dict[str, Any], declared: Declared | None = None, section: str = "") -> dict[str, Any]:
    """Dotted key → value. A block that may be of several types, or hold any keys, is one value.

    Of names there is a value more, the list of them.
    """
    declared = declared or declared_params()
    leaves: dict[str, Any] = {} if declared.entry is None else {section.rstrip("."): [*values]}
    for name, value in values.items():
        below = declared.entry or declared.below(name)
        if isinstance(value, dict) and not below.types and (below.keys or below.entry):
            leaves |= flat(value, below, f"{section}{name}.")
        else:
            leaves[f"{section}{name}"] = value
    return leaves


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """The keys that are in one only, or have another value there."""
    return [key for key in {**left, **right} if left.get(key, ABSENT) != right.get(key, ABSENT)]


def main(
    profile: Annotated[Path, typer.Option(help="The profile to use.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = PARAMS_FILE,
    drop_edits: Annotated[bool, typer.Option("--drop-edits", help="Overwrite settings that no profile has.")] = False,
) -> None:
    """Set every key of params.yaml as PROFILE says, or else to its default."""
    load_yaml(out)
    settings = settings_of(profile)
    if not drop_edits:
        refuse_to_drop_edits(out, profile.parent, settings)
    with written_whole(out) as (partial,):
        partial.write_text(params_text(settings, declared_params()), encoding="utf-8")
    usual, chosen = flat(default_params()), flat(settings)
    changed = [key for key in differing(usual, chosen) if key in chosen]  # what has gone is said by the list of names
    print(f"{out} holds profile {profile.stem}: {len(changed)} settings differ from the default")
    for key in changed:
        print(f"  {key}: {usual[key]} -> {chosen[key]}" if key in usual else f"  {key}: {chosen[key]}")


if __name__ == "__main__":
    run(main)
