"""Every key of params.yaml, and the oddities of YAML."""

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.settings.declaration import block
from stages.lib.settings.epochs import EarlyStopping
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.prepare_base import ModelOfFolder
from stages.lib.settings.prepare_data import Decontamination, NearDuplicates
from stages.lib.settings.save_every import SaveEvery
from stages.lib.settings.sections import default_params
from tests.fuzz.areas.yaml_texts import ODD_SCALARS, ODD_TEXTS
from tests.fuzz.base import overlaid
from tests.fuzz.case import Area, Case, Expected, Whole, nothing, put
from tests.fuzz.mutations import ODD_VALUES, Raw, yaml_text
from tests.stages.tiny_pipeline import TINY

DEFAULTS = default_params()
CHECK = FIRST = ("code_manifest",)
# The stages that read a section, where that is not the one of its name and entry.
STAGES_OF = {
    "sources": ("read_source_task@film_reviews", "prepare_data"),
    "prepare_data": ("prepare_data",),
    "prepare_base": ("prepare_base@base",),
    "tokenize_data": ("tokenize_data@sft",),
    "evaluate": ("evaluate@sft",),
    "score_samples": ("score_samples@sft",),
    **dict.fromkeys(("seed", "trust_remote_code", "kernels"), ("train_sft@sft",)),
}
MISSING = Raw("missing")
Path_ = tuple[str, ...]
# What is null or nothing by default: where it stands, and a sound value.
BLOCKS: dict[Path_, dict[str, Any]] = {
    ("train_sft", "sft", "lora"): block(LoraSettings) | {"rank": 4, "alpha": 8},
    ("train_sft", "sft", "early_stopping"): block(EarlyStopping),
    ("train_sft", "sft", "save_every"): block(SaveEvery) | {"steps": 3},
    ("train_ppo", "ppo", "save_every"): block(SaveEvery) | {"steps": 1, "keep_last_k": 1},
    ("prepare_data", "near_duplicates"): block(NearDuplicates),
    ("prepare_data", "decontamination"): block(Decontamination) | {"sources": ["film_reviews"]},
    ("prepare_base", "files", "mine"): block(ModelOfFolder) | {"path": "data/raw/model"},
}
MAY_BE_MISSING = [("evaluate_rm", "rm")]  # a reward model that is not evaluated


def keys_of(values: Mapping[str, Any], above: Path_ = ()) -> list[Path_]:
    """The path of every section and key."""
    found = []
    for key, value in values.items():
        found.append((*above, key))
        if isinstance(value, Mapping):
            found += keys_of(value, (*above, key))
    return found


KEYS = [*keys_of(DEFAULTS), *((*path, key) for path, values in BLOCKS.items() for key in values)]


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
    """The settings of the base project, with the block that the path is of if that is not there by default."""
    settings = tiny_settings()
    for place, values in BLOCKS.items():
        if path[:-1] == place:
            settings = with_value(settings, place, values)
    return settings


def stages_of(path: Path_) -> tuple[str, ...]:
    """The check of all settings, and the stages that read a key."""
    section, entries = path[0], DEFAULTS[path[0]]
    if section in STAGES_OF or not entries:
        return (*CHECK, *STAGES_OF.get(section, ()))
    return (*CHECK, f"{section}@{path[1] if path[1:2] and path[1] in entries else next(iter(entries))}")


def case(what: str, path: Path_, value: Any, expected: Expected = "either") -> Case:
    def prepare(folder: Path) -> None:
        put(folder / "params.yaml", yaml_text(with_value(settings_with(path), path, value)))
        if path[:2] == ("prepare_base", "files"):
            shutil.copytree(folder / "models/sft", folder / "data/raw/model")

    return Case(f"{'.'.join(path)} {what}", prepare, stages_of(path), expected)


# What every key is tried with: nothing, other types, huge numbers.
MISTAKES: tuple[tuple[str, Any, Expected], ...] = (
    ("is missing", MISSING, "refused"),
    ("is null", None, "either"),
    ("is a list", [[1]], "refused"),
    ("is -1", -1, "either"),
    ("is NaN", float("nan"), "refused"),
    ("is a 400-digit integer", 10**400, "either"),
)


def usual_mistakes(path: Path_) -> list[Case]:
    is_optional = path in MAY_BE_MISSING
    return [
        case(what, path, value, "accepted" if is_optional and value is MISSING else expected)
        for what, value, expected in MISTAKES
    ]


def misspelt(path: Path_) -> Case:
    holder, key = path[:-1], f"{path[-1]}s"

    def prepare(folder: Path) -> None:
        put(folder / "params.yaml", yaml_text(with_value(settings_with(path), (*holder, key), 1)))

    return Case(f"{'.'.join(path)} stands there, and {key} too", prepare, stages_of(path), "refused")


def later_section(section: str, changes: Mapping[str, Any]) -> Case:
    """A mistake in the section of a later stage, which the first stage must tell."""
    settings = {section: changes}
    return Case(f"{FIRST[0]} with {settings}", nothing, FIRST, "refused", settings)


LATER = (
    later_section("train_ppo", {"ppo": {"minibatch_size": 3}}),
    later_section("train_ppo", {"ppo": {"max_new_tokens": 4000}}),
    later_section("train_grpo", {"grpo": {"samples_per_prompt": 1}}),
    later_section("evaluate", {"max_new_tokens": 4000}),
    later_section("train_dpo", {"dpo": {"loss": Whole(type="hinge")}}),
    later_section("train_ppo", {"ppo": {"kl": {"controller": Whole(type="adaptive")}}}),
    later_section("evaluate", {"max_promts": 5}),
    later_section("train_sft", {"sft": {"epochs": -1.0}}),
    later_section("tokenize_data", {"max_length": 4000}),
    later_section("train_rm", {"rm": {"init_from": "models/none"}}),
    later_section("ref_logprobs", {"sft": {"precision": "fp8"}}),
    later_section("train_sft", {"sft": {"lora": {"rank": 0}}}),
    later_section("train_dpo", {"dpo": {"model": "models/none"}}),
    later_section("train_dpo", {"dpo": {"model": "models/dpo"}}),
    later_section("train_dpo", {"dpo": {"model": "models/rm"}}),
    later_section("train_dpo", {"dpo": {"reference": "models/sft"}}),
    later_section("train_ppo", {"ppo": {"reward_model": "models/sft"}}),
    later_section("train_ppo", {"ppo": {"reward_head": "score"}}),
    later_section("train_grpo", {"grpo": {"reward_label": "good"}}),
    later_section("train_rm", {"sft": {}}),
    later_section("evaluate", {"policies": {"sft": "models/sft/step_3"}}),
    later_section("evaluate", {"policies": {"sft": "models/sft/../rm"}}),
    later_section("score_samples", {"policies": ["sft", "best"]}),
    later_section("score_samples", {"policies": ["sft", "sft"]}),
    later_section("score_samples", {"reward_model": None}),
    later_section("prepare_data", {"kinds": ["sft", "prompts"]}),
    later_section("prepare_data", {"validation_fraction": 0.5, "test_fraction": 0.5}),
)
ODD_NAMES = ("", ".", "..", "../x", "a/b", "a b", "a.b", "$(touch pwned)", "; touch pwned", "-x", "é", "x\ny", "x" * 65)
ODD_NAMES += ("${item}", "a@b", "\0", "CON", "5", "null", "__proto__", "base")
MAPPINGS: tuple[Path_, ...] = (
    *((section,) for section in ("train_sft", "train_rm", "ref_logprobs", "train_dpo", "train_ppo", "evaluate_rm")),
    ("sources", "tasks"),
    ("prepare_base", "scratch"),
    ("evaluate", "policies"),
)


def odd_name(place: Path_, name: str) -> Case:
    """One more entry, which is sound but for its name. It becomes that of a folder, of a stage and of a file."""

    def prepare(folder: Path) -> None:
        settings = tiny_settings()
        entries = settings
        for key in place:
            entries = entries[key]
        put(folder / "params.yaml", yaml_text(with_value(settings, (*place, name), next(iter(entries.values())))))

    return Case(f"{'.'.join(place)} has an entry {name[:20]!r}", prepare, CHECK, "either")


NAMES = tuple(odd_name(place, name) for place in MAPPINGS for name in ODD_NAMES)
ENTRIES = tuple(
    Case(f"--name {name!r}", nothing, (f"train_sft@{name}",), "refused", settings)
    for name, settings in (
        ("dpo", {}),
        ("../sft", {}),
        ("sft\nerror: x", {}),
        ("\ud800", {}),
        ("sft", {"train_sft": Whole()}),
        ("sft", {"train_sft": Whole(other=None)}),
    )
)


def on_the_way(every: int, keep: int | None, steps: list[int], policy: str, expected: Expected = "accepted") -> Case:
    """Folders of the way, of a training of 8 steps, and the evaluation of one of them."""
    settings = {
        "train_sft": {"sft": {"save_every": {"steps": every, "keep_last_k": keep}}},
        "evaluate": {"policies": Whole(sft="models/sft", way=policy)},
        "score_samples": {"policies": ["sft"]},
    }

    def complaint(folder: Path, accepted: bool) -> str | None:
        found = sorted(path.name for path in (folder / "models/sft").glob("step_*"))
        return f"folders of the way: {found}" if accepted and found != [f"step_{step}" for step in steps] else None

    what = f"save_every {every}, keep_last_k {keep}, and {policy} is evaluated"
    return Case(what, nothing, (*CHECK, "train_sft@sft", "evaluate@way"), expected, settings, complaint=complaint)


ON_THE_WAY = (
    on_the_way(3, None, [3, 6], "models/sft/step_3"),
    on_the_way(3, 1, [6], "models/sft/step_6"),
    on_the_way(3, 1, [6], "models/sft/step_3", "refused"),
    on_the_way(8, None, [], "models/sft"),
    on_the_way(4, None, [4], "models/sft/step_8", "refused"),
    on_the_way(99, None, [], "models/sft/step_99", "refused"),
    on_the_way(1, 2, [6, 7], "models/sft/../sft/step_7"),
    on_the_way(3, None, [3, 6], "models/sft/step_4", "refused"),
    on_the_way(3, None, [3, 6], "models/sft/step_03", "refused"),
    on_the_way(3, None, [3, 6], "models/sft/step_3/config.json", "refused"),
)


def odd_text(what: str, text: str, expected: Expected) -> Case:
    def prepare(folder: Path) -> None:
        put(folder / "params.yaml", text.replace("@all@", yaml_text(tiny_settings())[1:-1]))

    return Case(f"params.yaml: {what}", prepare, (*CHECK, "prepare_data"), expected)


def odd_scalar(path: Path_, text: str) -> Case:
    return case(f"is `{text[:60]}`", path, Raw(text), "either")


SCALARS = tuple(
    odd_scalar(path, text)
    for path in (
        ("train_sft", "sft", "epochs"),
        ("train_sft", "sft", "batch_size"),
        ("evaluate", "max_prompts"),
        ("evaluate", "policies", "sft"),
        ("seed",),
    )
    for text in ODD_SCALARS
)


def file_case(what: str, name: str, prepare: Any, *, unprivileged: bool = False) -> Case:
    return Case(
        what,
        lambda folder: prepare(folder / name),
        stages_of(("train_sft", "sft")),
        "refused",
        unprivileged=unprivileged,
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
    path = draw.choice(KEYS)
    what, value = draw.choice(ODD_VALUES)
    return case(f"is {what[:80]}", path, value)


AREA = Area(
    needs=("data", "models", "metrics"),
    named=(*LATER, *NAMES, *ENTRIES, *ON_THE_WAY, *(odd_text(*text) for text in ODD_TEXTS), *FILES, *SCALARS),
    systematic=tuple(c for path in KEYS for c in [*usual_mistakes(path), misspelt(path)]),
    mutated=mutated,
    share=0.1,
    may_run_on=True,
)
