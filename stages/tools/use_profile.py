"""Write params.yaml from a profile: the default settings, with the profile's own values laid over them.

    python -m stages.tools.use_profile --profile profiles/hh-local.yaml

profiles/default.yaml is the whole of the default settings, every other profile only what it changes. So a profile never
stands on what params.yaml happened to hold, and going back to `default` gives back its very bytes. What is written has
the form in which DVC writes the file (`dvc exp run -S`), so that an experiment changes its own lines alone. Settings
that were edited in params.yaml itself, and so stand in no profile, are not overwritten unless asked to.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from dvc.utils.serialize import dumps_yaml, loads_yaml, parse_yaml_for_update
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from stages.lib.command.errors import StageError
from stages.lib.command.outputs import written_whole
from stages.lib.command.params import PARAMS_FILE, describe, load_yaml, nearest
from stages.lib.command.run import run

DEFAULT_PROFILE = Path("profiles/default.yaml")


def overlaid(default: Path, profile: Path) -> str:
    """The text of `default` with the values of `profile` in it; comments and order are those of `default`.

    Raises:
        StageError: a file is missing or no YAML, or the profile has a key that the default has not (the nearest known
            key is named) or a value where a section is expected.
    """
    if profile.resolve() == default.resolve():
        load_yaml(default)
        return default.read_text(encoding="utf-8")
    require_profile(profile)
    values = load_yaml(profile)
    load_yaml(default)
    settings = with_comments(default)
    lay_over(settings, with_comments(profile) if values else {}, str(profile), "")
    return dumps_yaml(settings)


def with_comments(path: Path) -> CommentedMap:
    """A YAML file as DVC reads it to change it: with comments, order and line breaks."""
    return parse_yaml_for_update(path.read_text(encoding="utf-8"), str(path))


def require_profile(profile: Path) -> None:
    if not profile.is_file():
        known = sorted(path.stem for path in profile.parent.glob("*.yaml"))
        names = ", ".join(known) or "none"
        raise StageError(f"{profile} is missing{nearest(profile.stem, known)}; the profiles are: {names}")


def lay_over(settings: CommentedMap, values: CommentedMap, profile: str, section: str) -> None:
    """Put `values` into `settings`, section by section. A section that is empty in the default takes any keys."""
    for key, value in values.items():
        name = f"{section}{key}"
        if key not in settings:
            raise StageError(f"{profile}: {name} is not a known key{nearest(str(key), settings)}")
        known = settings[key]
        if isinstance(known, CommentedMap) and known:
            if not isinstance(value, CommentedMap):
                raise StageError(f"{profile}: {name} is a section: expected keys, found {describe(value)}")
            lay_over(known, value, profile, f"{name}.")
        elif isinstance(value, CommentedMap) and not isinstance(known, CommentedMap | None):
            raise StageError(f"{profile}: {name} is one value, such as {known!r}: expected no keys below it")
        else:
            settings[key] = as_dvc_writes(value)


def as_dvc_writes(value: Any) -> Any:
    """A list on lines of its own. Keys in brackets, so that the comment behind the key above them stays on its line."""
    if isinstance(value, CommentedMap):
        value.fa.set_flow_style()
    return list(value) if isinstance(value, CommentedSeq) else value


def refuse_to_drop_edits(params: Path, default: Path, wanted: str) -> None:
    """Raise StageError if `params` holds what no profile gives, naming the keys that would be lost."""
    if not params.exists():
        return
    standard, held = load_yaml(default), load_yaml(params)
    text = params.read_text(encoding="utf-8")
    texts = dict(texts_of_profiles(default))
    if text in (*texts.values(), wanted):
        return
    lost = {name: differing(flat(held, standard), flat(loads_yaml(text), standard)) for name, text in texts.items()}
    closest = min(lost, key=lambda name: len(lost[name]))
    edits = ", ".join(lost[closest]) or "its comments or layout only"
    raise StageError(
        f"{params} was edited and would be overwritten; against profile {closest} it differs in: {edits}. "
        "Keep the edits as a profile of your own (those keys in profiles/NAME.yaml), or drop them: "
        "make use PROFILE=... FORCE=1 (--drop-edits)"
    )


def texts_of_profiles(default: Path) -> Iterator[tuple[str, str]]:
    """(name, text of params.yaml) of each profile; one that is broken could not have been in use."""
    for profile in sorted(default.parent.glob("*.yaml")):
        try:
            yield profile.stem, overlaid(default, profile)
        except StageError:
            continue


def flat(values: dict[str, Any], standard: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Dotted key -> value, with the sections that the default settings have; below them a mapping is one value."""
    leaves = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(standard.get(key), dict) and standard[key]:
            leaves |= flat(value, standard[key], f"{section}{key}.")
        else:
            leaves[f"{section}{key}"] = value
    return leaves


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """The keys that are in one only, or have another value there."""
    absent = object()
    return [key for key in {**left, **right} if left.get(key, absent) != right.get(key, absent)]


def main(
    profile: Annotated[Path, typer.Option(help="The profile to use.")],
    default: Annotated[Path, typer.Option(help="The default settings, all of them.")] = DEFAULT_PROFILE,
    out: Annotated[Path, typer.Option(help="The file to write.")] = PARAMS_FILE,
    drop_edits: Annotated[bool, typer.Option("--drop-edits", help="Overwrite settings that no profile has.")] = False,
) -> None:
    """Write params.yaml from PROFILE."""
    text = overlaid(default, profile)
    if not drop_edits:
        refuse_to_drop_edits(out, default, text)
    with written_whole(out) as (partial,):
        partial.write_text(text, encoding="utf-8")
    standard = load_yaml(default)
    usual, chosen = flat(standard, standard), flat(load_yaml(out), standard)
    changed = differing(usual, chosen)
    print(f"{out} holds profile {profile.stem}: {len(changed)} settings differ from the default")
    for key in changed:
        print(f"  {key}: {usual[key]} -> {chosen[key]}")


if __name__ == "__main__":
    run(main)
