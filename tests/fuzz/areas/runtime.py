"""Every key of runtime.yaml."""

import random
from typing import Any

from tests.fuzz.areas.params import CHECK, MISSING, Path_, keys_of, with_value
from tests.fuzz.areas.yaml_texts import ODD_SCALARS, ODD_TEXTS
from tests.fuzz.base import overlaid
from tests.fuzz.case import Area, Case, Expected, nothing, put
from tests.fuzz.mutations import ODD_VALUES, Raw, yaml_text
from tests.stages.tiny_pipeline import PROJECT, read_yaml

DEFAULTS = overlaid(read_yaml(PROJECT / "runtime.yaml"), {"default": {"threads": 1}})
KEYS = [path for path in keys_of(DEFAULTS) if len(path) > 1]
STAGES = ("ref_logprobs@sft", "train_sft@sft", "evaluate@sft")


def case(what: str, path: Path_, value: Any, expected: Expected = "either", stage: str = STAGES[0]) -> Case:
    text = yaml_text(with_value(DEFAULTS, path, value))
    return Case(
        f"{'.'.join(path)} {what}", lambda folder: put(folder / "runtime.yaml", text), (*CHECK, stage), expected
    )


def usual_mistakes(path: Path_) -> list[Case]:
    wrong: list[tuple[str, Any, Expected]] = [
        ("is missing", MISSING, "refused"),
        ("is null", None, "either"),
        ("is a list in a list", [[1]], "refused"),
        ("is -1", -1, "refused"),
        ("is NaN", float("nan"), "refused"),
        ("is a 400-digit integer", 10**400, "either"),
        ("is 0", 0, "either"),
    ]
    return [case(what, path, *rest) for what, *rest in wrong]


def sections(what: str, values: Any, expected: Expected, stage: str = "train_sft@sft") -> Case:
    text = yaml_text({**DEFAULTS, **values})
    return Case(f"runtime.yaml: {what}", lambda folder: put(folder / "runtime.yaml", text), (*CHECK, stage), expected)


def on_this_machine(what: str, values: Any, expected: Expected) -> Case:
    """What only a stage that computes can tell, since torch or DeepSpeed says it."""
    return sections(what, values, expected)._replace(stages=("train_sft@sft",))


FOLDERS = (
    "/etc",
    "../x",
    ".git",
    ".dvc",
    ".",
    "",
    "/",
    "data/raw/x",
    "runs/../.git/hooks",
    "models",
    ".scratch",
    ".venv",
)
NAMED = (
    *(
        Case(
            f"tracker_folder is {folder!r}",
            nothing,
            (*CHECK, "train_sft@sft"),
            "refused",
            runtime={"tracker_folder": folder},
        )
        for folder in (*FOLDERS, "stages", "tests/x", "\0")
    ),
    sections("a section 'evaluate'", {"evaluate": {"micro_batch_tokens": 4096}}, "accepted", "evaluate@sft"),
    sections("a section 'evaluate' is looked at by train_sft", {"evaluate": {"x": 1}}, "refused"),
    sections("a section that is null", {"train_sft": None}, "either"),
    sections("a section that is text", {"train_sft": "fast"}, "refused"),
    sections("a section that is an empty list", {"train_sft": []}, "refused"),
    sections("a default that is null", {"default": None}, "refused"),
    sections("an unknown section", {"train_kto": {}}, "refused"),
    sections("an unknown key", {"train_sft": {"speed": 1}}, "refused"),
    sections("an empty section name", {"": {}}, "refused"),
    on_this_machine(
        "deepspeed keys that are numbers", {"train_sft": {"deepspeed": {"zero_optimization": {"1": 2}}}}, "either"
    ),
    on_this_machine("deepspeed that is unknown", {"train_sft": {"deepspeed": {"no_such_key": 1}}}, "either"),
    on_this_machine(
        "deepspeed nested deeply", {"train_sft": {"deepspeed": {"a": Raw("[" * 500 + "]" * 500)}}}, "either"
    ),
    sections("zero_optimization is a list", {"train_sft": {"deepspeed": {"zero_optimization": []}}}, "refused"),
    on_this_machine("a GPU that is not there", {"train_sft": {"device": "cuda"}}, "refused"),
    sections("flash attention on a CPU", {"train_sft": {"attention": "flash_attention_2"}}, "refused"),
    sections("a micro batch below one row", {"train_sft": {"micro_batch_tokens": 1}}, "either"),
    sections("on_out_of_memory: retry", {"train_sft": {"on_out_of_memory": "retry"}}, "accepted"),
    sections("on_out_of_memory: perhaps", {"train_sft": {"on_out_of_memory": "perhaps"}}, "refused"),
)
SCALARS = tuple(
    case(f"is `{text[:60]}`", ("default", key), Raw(text))
    for key in ("threads", "checkpoint_seconds", "packing")
    for text in ODD_SCALARS
)


def odd_text(what: str, text: str, expected: Expected) -> Case:
    whole = text.replace("@all@", yaml_text(DEFAULTS)[1:-1])
    return Case(
        f"runtime.yaml: {what}", lambda folder: put(folder / "runtime.yaml", whole), (*CHECK, STAGES[0]), expected
    )


def mutated(draw: random.Random) -> Case:
    path = draw.choice(KEYS)
    what, value = draw.choice(ODD_VALUES)
    return case(f"is {what[:80]}", path, value, stage=draw.choice(STAGES))


AREA = Area(
    needs=("data", "models", "metrics"),
    named=(*NAMED, *(odd_text(*text) for text in ODD_TEXTS if "seed" not in text[1]), *SCALARS),
    systematic=tuple(one for path in KEYS for one in usual_mistakes(path)),
    mutated=mutated,
    share=0.06,
    may_run_on=True,
)
