"""Write params.yaml from a profile: the default settings, with the profile's own values laid over them.

    python -m stages.tools.use_profile --profile profiles/hh-local.yaml
    python -m stages.tools.use_profile --profile profiles/default.yaml

A profile lists its changes to the defaults that the settings declare (`make explain`); `default` needs no file, since
it changes nothing. The result never depends on what params.yaml happened to hold before. Comments, order and layout
stay as they are, and the file has the form in which DVC writes it (`dvc exp run -S`), so that an experiment changes its
own lines alone. Settings that were edited in params.yaml itself, and so stand in no profile, are not overwritten unless
asked to.
"""

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from statistics import mode
from typing import Annotated, Any

import typer
from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from stages.lib.command.errors import StageError
from stages.lib.command.json_schema import KIND
from stages.lib.command.outputs import written_whole
from stages.lib.command.params import PARAMS_FILE
from stages.lib.command.quoted import nearest
from stages.lib.command.run import run
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.settings.sections import build_all, default_params

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
    settings = merged(default_params(), load_yaml(profile))
    build_all(settings, profile)
    return settings


def merged(default: Any, values: Any) -> Any:
    """`values` over `default`, block by block; a block of another type replaces the default's."""
    if not (isinstance(default, dict) and isinstance(values, dict)):
        return values
    if values.get(KIND, default.get(KIND)) != default.get(KIND):
        return values
    return default | {name: merged(default.get(name), value) for name, value in values.items()}


def text_with(text: str, settings: dict[str, Any]) -> str:
    """The text of a params.yaml with these settings, and its own comments, order and layout."""
    held = parse_yaml_for_update(text, str(PARAMS_FILE))
    set_values(held, settings)
    return dumps_yaml(held)


def set_values(held: CommentedMap, wanted: dict[str, Any]) -> None:
    """Make `held` hold what is wanted, and touch only the values that are others."""
    for name in [name for name in held if name not in wanted]:
        del held[name]
    for name, value in wanted.items():
        found = held.get(name, ABSENT)
        if (
            isinstance(found, CommentedMap)
            and found
            and not found.fa.flow_style()
            and isinstance(value, dict)
            and value
        ):
            set_values(found, value)
        elif not (found == value and type_of_number(found) is type_of_number(value)):
            held[name] = as_dvc_writes(value)
            align_comment(held, name)


def align_comment(held: CommentedMap, name: str) -> None:
    """Put the comment behind a value into the column of its neighbours: a longer value has pushed it away."""
    marks = {key: tokens[2].start_mark for key, tokens in held.ca.items.items() if tokens[2]}
    if name in marks:
        marks[name].column = mode(mark.column for mark in marks.values())


def type_of_number(value: Any) -> type | None:
    """Python takes true, 1 and 1.0 for equal."""
    return next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)


def as_dvc_writes(value: Any) -> Any:
    """A small number as 1.0e-5. Keys in brackets, so that the comment behind the key above them stays on its line."""
    if isinstance(value, dict):
        block = CommentedMap({name: as_dvc_writes(item) for name, item in value.items()})
        if not any(isinstance(item, dict) for item in value.values()):
            block.fa.set_flow_style()
        return block
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        digits, _, exponent = f"{Decimal(repr(value)):e}".partition("e")
        return YAML().load(f"{digits if '.' in digits else f'{digits}.0'}e{exponent}")
    return value


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


def flat(values: dict[str, Any], defaults: dict[str, Any] | None = None, section: str = "") -> dict[str, Any]:
    """Dotted key → value. A block that may be of several types, or hold any keys, is one value."""
    defaults = default_params() if defaults is None else defaults
    leaves = {}
    for name, value in values.items():
        usual = defaults.get(name)
        if isinstance(value, dict) and isinstance(usual, dict) and usual and KIND not in usual:
            leaves |= flat(value, usual, f"{section}{name}.")
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
    text = text_with(out.read_text(encoding="utf-8"), settings)
    with written_whole(out) as (partial,):
        partial.write_text(text, encoding="utf-8")
    usual, chosen = flat(default_params()), flat(settings)
    changed = differing(usual, chosen)
    print(f"{out} holds profile {profile.stem}: {len(changed)} settings differ from the default")
    for key in changed:
        print(f"  {key}: {usual[key]} -> {chosen[key]}")


if __name__ == "__main__":
    run(main)
