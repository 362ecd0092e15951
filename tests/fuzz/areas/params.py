"""Every key of params.yaml, and the oddities of YAML."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.settings.sections import default_params
from tests.fuzz.areas.yaml_texts import ODD_SCALARS, ODD_TEXTS
from tests.fuzz.base import overlaid
from tests.fuzz.case import Area, Case, Expected, nothing, put
from tests.fuzz.mutations import ODD_VALUES, Raw, yaml_text
from tests.stages.tiny_pipeline import TINY

DEFAULTS = default_params()
LORA = {
    "rank": 4,
    "alpha": 8,
    "targets": "all-linear",
    "rslora": False,
    "base_quantization": None,
    "save_adapter": False,
}
CHECK = FIRST = ("code_manifest",)
STAGE_OF = {"tokenize_data": "tokenize_data@sft", "evaluate": "evaluate@sft", "seed": "train_sft"}
MISSING = Raw("missing")
Path_ = tuple[str, ...]


def keys_of(values: Mapping[str, Any], above: Path_ = ()) -> list[Path_]:
    """The path of every section and key."""
    found = []
    for key, value in values.items():
        found.append((*above, key))
        if isinstance(value, Mapping):
            found += keys_of(value, (*above, key))
    return found


KEYS = [path for path in keys_of(DEFAULTS) if len(path) > 1 or path == ("seed",)]
WITH_LORA = [("train_sft", "lora", key) for key in LORA]


def with_value(settings: Mapping[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    """The settings with one value replaced, or without that key if it is `MISSING`."""
    changed = overlaid(settings, {})
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    if value is MISSING:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return changed


def tiny_settings() -> dict[str, Any]:
    from tests.fuzz.base import SMALLER

    return overlaid(overlaid(DEFAULTS, TINY), SMALLER)


def settings_with(path: Path_) -> dict[str, Any]:
    """The settings of the base project, with adapters if the path is one of theirs."""
    settings = tiny_settings()
    if path[1:2] == ("lora",) and len(path) > 2:
        settings[path[0]]["lora"] = dict(LORA)
    return settings


def stages_of(section: str) -> tuple[str, ...]:
    """The check of all settings, and the stage that reads a section."""
    return (*CHECK, STAGE_OF.get(section, section))


def case(what: str, path: Path_, value: Any, expected: Expected = "either") -> Case:
    def prepare(folder: Path) -> None:
        put(folder / "params.yaml", yaml_text(with_value(settings_with(path), path, value)))

    return Case(f"{'.'.join(path)} {what}", prepare, stages_of(path[0]), expected)


def usual_mistakes(path: Path_) -> list[Case]:
    """What every key is tried with: nothing, other types, huge numbers, another name."""
    wrong: list[tuple[str, Any, Expected]] = [
        ("is missing", MISSING, "refused"),
        ("is null", None, "either"),
        ("is a list", [[1]], "refused"),
        ("is -1", -1, "either"),
        ("is NaN", float("nan"), "refused"),
        ("is a 400-digit integer", 10**400, "either"),
    ]
    if path[0] == "seed":
        wrong = [entry for entry in wrong if entry[0] != "is missing"]
    return [case(*entry[:1], path, *entry[1:]) for entry in wrong]


def misspelt(path: Path_) -> Case:
    holder, key = path[:-1], f"{path[-1]}s"

    def prepare(folder: Path) -> None:
        put(folder / "params.yaml", yaml_text(with_value(settings_with(path), (*holder, key), 1)))

    return Case(f"{'.'.join(path)} stands there, and {key} too", prepare, stages_of(path[0]), "refused")


def later_section(section: str, key: str, value: Any) -> Case:
    """A mistake in the section of a later stage, which the first stage must tell."""
    settings = {section: {key: value}}
    return Case(f"{FIRST[0]} with {section}.{key}: {value!r}", nothing, FIRST, "refused", settings)


LATER = (
    later_section("train_ppo", "minibatch_size", 3),
    later_section("train_ppo", "max_new_tokens", 4000),
    later_section("evaluate", "max_new_tokens", 4000),
    later_section("train_dpo", "loss", {"type": "hinge"}),
    later_section("train_ppo", "kl_controller", {"type": "adaptive"}),
    later_section("evaluate", "max_promts", 5),
    later_section("train_sft", "epochs", -1.0),
    later_section("tokenize_data", "max_length", 4000),
    later_section("train_rm", "init_from", "models/none"),
    later_section("ref_logprobs", "precision", "fp8"),
    later_section("train_sft", "lora", {"rank": 0}),
)


def odd_text(what: str, text: str, expected: Expected) -> Case:
    def prepare(folder: Path) -> None:
        put(folder / "params.yaml", text.replace("@all@", yaml_text(tiny_settings())[1:-1]))

    return Case(f"params.yaml: {what}", prepare, (*CHECK, "prepare_data"), expected)


def odd_scalar(path: Path_, text: str) -> Case:
    return case(f"is `{text[:60]}`", path, Raw(text), "either")


SCALARS = tuple(
    odd_scalar(path, text)
    for path in (("train_sft", "epochs"), ("train_sft", "batch_size"), ("prepare_data", "max_rows"), ("seed",))
    for text in ODD_SCALARS
)


def file_case(what: str, name: str, prepare: Any, *, unprivileged: bool = False) -> Case:
    return Case(
        what, lambda folder: prepare(folder / name), stages_of("train_sft"), "refused", unprivileged=unprivileged
    )


FILES = tuple(
    case
    for name in ("params.yaml", "runtime.yaml")
    for case in (
        file_case(f"{name} cannot be read", name, lambda path: path.chmod(0), unprivileged=True),
        file_case(f"{name} is a folder", name, lambda path: (path.unlink(), path.mkdir())),
        file_case(f"{name} is not there", name, lambda path: path.unlink()),
        file_case(f"{name} is not UTF-8", name, lambda path: put(path, b"seed: \xff\n")),
        file_case(f"{name} is empty", name, lambda path: put(path, "")),
        file_case(f"{name} is a dangling link", name, lambda path: (path.unlink(), path.symlink_to("nowhere"))),
    )
)


def mutated(draw: random.Random) -> Case:
    """One key with any odd value."""
    path = draw.choice([*KEYS, *WITH_LORA])
    what, value = draw.choice(ODD_VALUES)
    return case(f"is {what[:80]}", path, value)


AREA = Area(
    needs=("data", "models", "metrics"),
    named=(*LATER, *(odd_text(*text) for text in ODD_TEXTS), *FILES, *SCALARS),
    systematic=tuple(c for path in [*KEYS, *WITH_LORA] for c in [*usual_mistakes(path), misspelt(path)]),
    mutated=mutated,
    share=0.12,
    may_run_on=True,
)
