"""Every block that an entry may hold by its type, or in the place of null, with every key of it."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic.fields import FieldInfo

from stages.lib.settings.declaration import Settings, block
from stages.lib.settings.ensemble_member import EnsembleMember
from stages.lib.settings.evaluate import Evaluate
from stages.lib.settings.pass_rates import PassRates
from stages.lib.settings.train_grpo import TrainGrpo
from stages.lib.settings.train_ppo import TrainPpo
from tests.fuzz.areas.params import CHECK, MISSING, MISTAKES, Path_, tiny_settings, with_value
from tests.fuzz.case import Area, Case, Expected, put
from tests.fuzz.mutations import ODD_VALUES, yaml_text
from tests.stages.tiny_pipeline import PROJECT

# Where the settings stand whose blocks are tried, and the stage that reads them.
PLACES: dict[Path_, tuple[type[Settings], str]] = {
    ("train_ppo", "ppo"): (TrainPpo, "train_ppo@ppo"),
    ("train_grpo", "grpo"): (TrainGrpo, "train_grpo@grpo"),
    ("pass_rates", "few"): (PassRates, "pass_rates@few"),
    ("ensemble_member", "one"): (EnsembleMember, "ensemble_member@one"),
    ("evaluate",): (Evaluate, "evaluate@sft"),
}
NAMED = "one"  # the entry of a mapping by names, such as rewards


class Block(NamedTuple):
    """A block in its place, and the stage that reads it."""

    place: Path_
    kind: type[Settings]
    stage: str
    above: dict[str, Any]  # settings in which the place is

    @property
    def values(self) -> dict[str, Any]:
        """Its defaults."""
        return block(self.kind)

    @property
    def settings(self) -> dict[str, Any]:
        return with_value(self.above, self.place, self.values)


def kinds_of(annotation: Any) -> Iterator[type[Settings]]:
    """The blocks that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for part in get_args(annotation):
        yield from kinds_of(part)


def blocks_of(place: Path_, kind: type[Settings], stage: str, above: dict[str, Any]) -> Iterator[Block]:
    """Those of all fields of `kind`, whose settings stand in `place`, and those within them."""
    for name, field in kind.model_fields.items():
        own = (*place, name)
        found = dict.fromkeys(kinds_of(annotation_of(field)))
        if found and isinstance(values_at(above, own), dict) and is_mapping_of_names(field):
            own = (*own, NAMED)
        for inner in found:
            one = Block(own, inner, stage, above)
            yield one
            yield from blocks_of(own, inner, stage, one.settings)


def annotation_of(field: FieldInfo) -> Any:
    return field.rebuild_annotation()


def is_mapping_of_names(field: FieldInfo) -> bool:
    return any(getattr(part, "__origin__", None) is dict for part in (field.annotation, *get_args(field.annotation)))


def values_at(settings: dict[str, Any], path: Path_) -> Any:
    for key in path:
        settings = settings[key]
    return settings


def start(place: Path_, kind: type[Settings]) -> dict[str, Any]:
    """The tiny settings, with an entry where a section is empty by default."""
    settings = tiny_settings()
    return settings if kind is Evaluate or place[1] in settings[place[0]] else with_value(settings, place, block(kind))


BLOCKS = [one for place, (kind, stage) in PLACES.items() for one in blocks_of(place, kind, stage, start(place, kind))]


def case(what: str, one: Block, path: Path_, value: Any, expected: Expected = "either") -> Case:
    def prepare(folder: Path) -> None:
        (folder / "rewards").symlink_to(PROJECT / "rewards")
        put(folder / "params.yaml", yaml_text(with_value(one.settings, path, value)))

    kind = one.values.get("type", one.kind.__name__)
    return Case(f"{'.'.join(one.place)} ({kind}): {path[-1]} {what}", prepare, (*CHECK, one.stage), expected)


def in_its_place(one: Block) -> Iterator[Case]:
    """The block as it is by default, and what is none of its keys or types."""
    yield case("as by default", one, one.place, one.values)
    yield case("is not a key of it", one, (*one.place, "no_such_key"), 1, "refused")
    if "type" in one.values:
        yield case("is unknown", one, (*one.place, "type"), "no_such_type", "refused")


def of_each_key(one: Block) -> Iterator[Case]:
    for key in one.values:
        for what, value, expected in MISTAKES:
            yield case(what, one, (*one.place, key), value, expected)


def untried() -> list[Block]:
    """Each kind of block once, but those that stand in params.yaml, whose keys are tried there."""
    tried = {one.kind for one in BLOCKS if same_keys(values_at(one.above, one.place[:-1]).get(one.place[-1]), one)}
    return [*{one.kind: one for one in reversed(BLOCKS) if one.kind not in tried}.values()]


def same_keys(values: Any, one: Block) -> bool:
    own = one.values
    return isinstance(values, dict) and values.keys() == own.keys() and values.get("type") == own.get("type")


def mutated(draw: random.Random) -> Case:
    """One key with any odd value."""
    one = draw.choice([each for each in BLOCKS if each.values])
    what, value = draw.choice([*ODD_VALUES, ("is missing", MISSING)])
    return case(what if value is MISSING else f"is {what[:80]}", one, (*one.place, draw.choice([*one.values])), value)


AREA = Area(
    needs=("data", "models", "metrics"),
    named=(),
    systematic=(
        *(found for one in BLOCKS for found in in_its_place(one)),
        *(found for one in untried() for found in of_each_key(one)),
    ),
    mutated=mutated,
    share=0.05,
    may_run_on=True,
)
