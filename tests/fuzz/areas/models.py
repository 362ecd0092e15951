"""Model folders: configuration, tokenizer and weights, as given by a user and as the stages before left them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.areas.odd_configs import CODE, CONFIG_VALUES, INDEXES, PICKLE, TOKENIZER_VALUES
from tests.fuzz.areas.params import CHECK
from tests.fuzz.case import Area, Case, Expected, Whole, put
from tests.fuzz.mutations import json_text, mutated_bytes, mutated_tree

GIVEN = "models/given"
OF_FOLDER = {"path": GIVEN, "chat_template": None, "special_tokens": [], "eos_token": None, "dtype": "float32"}
GIVEN_STAGES = (*CHECK, "prepare_base_files@base", "tokenize_data@sft", "train_sft@sft")
# The model that a stage reads, and the stage.
READ_BY = (
    ("models/base", "tokenize_data@sft"),
    ("models/base", "train_sft@sft"),
    ("models/sft", "train_rm@rm"),
    ("models/sft", "ref_logprobs@sft"),
    ("models/sft", "train_dpo@dpo"),
    ("models/rm", "train_ppo@ppo"),
    ("models/rm", "train_grpo@grpo"),
    ("models/rm", "score_samples@sft"),
    ("models/rm", "evaluate_rm@rm"),
    ("models/dpo", "evaluate@dpo"),
)
JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
FILES = (*JSON_FILES, "model.safetensors", "chat_template.jinja")


def given(what: str, change: Callable[[Path], object], expected: Expected = "either", **more: Any) -> Case:
    """A model folder that the user brings."""

    def prepare(folder: Path) -> None:
        shutil.copytree(folder / "models/dpo", folder / GIVEN)  # models/base is an out of the first stage
        change(folder / GIVEN)

    base = OF_FOLDER | more.pop("settings", {})
    settings = {"prepare_base": Whole(scratch={}, files={"base": base}, hub={})}
    return Case(f"given model: {what}", prepare, GIVEN_STAGES, expected, settings, **more)


def made(what: str, model: str, stage: str, change: Callable[[Path], object], expected: Expected = "either") -> Case:
    """A model folder of ours that something has changed since."""
    return Case(f"{stage}, {model}: {what}", lambda folder: change(folder / model), (stage,), expected)


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(model: Path) -> None:
        values = json.loads((model / name).read_text())
        change(values)
        put(model / name, json_text(values))

    return act


def with_key(name: str, key: str, value: Any) -> Callable[[Path], None]:
    return edit(name, lambda values: values.__setitem__(key, value))


def without_key(name: str, key: str) -> Callable[[Path], None]:
    return edit(name, lambda values: values.pop(key, None))


def only_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    put(model / "pytorch_model.bin", PICKLE)


def with_code(key: str, kind: str, file: str = "config.json") -> Callable[[Path], None]:
    """A folder that asks for code of its own to be run."""

    def act(model: Path) -> None:
        put(model / "code.py", CODE)
        edit(file, lambda values: values.update({"model_type": kind, "auto_map": {key: "code.Model"}}))(model)

    return act


def tokenizer_with_code(model: Path) -> None:
    put(model / "code.py", CODE)
    changed = {"auto_map": {"AutoTokenizer": ["code.Model", "code.Model"]}, "tokenizer_class": "OwnTokenizer"}
    edit("tokenizer_config.json", lambda values: values.update(changed))(model)


def with_index(text: str) -> Callable[[Path], None]:
    def act(model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        put(model / "model.safetensors.index.json", text)

    return act


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the header of the weights' file."""

    def act(model: Path) -> None:
        content = (model / "model.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        values = json.loads(content[8 : 8 + size])
        change(values)
        text = json.dumps(values).encode()
        put(model / "model.safetensors", len(text).to_bytes(8, "little") + text + content[8 + size :])

    return act


def first_weight(values: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in values.items() if key != "__metadata__")


def broken_weights(value: bytes) -> Callable[[Path], None]:
    """The last weights are NaN, or whatever these four bytes are."""

    def act(model: Path) -> None:
        content = (model / "model.safetensors").read_bytes()
        put(model / "model.safetensors", content[: -len(value) * 64] + value * 64)

    return act


HEADERS: tuple[tuple[str, Callable[[Path], None]], ...] = (
    ("a weight of another shape", header(lambda values: first_weight(values).update(shape=[1]))),
    ("a weight of an unknown type", header(lambda values: first_weight(values).update(dtype="F99"))),
    ("a weight beyond the end", header(lambda values: first_weight(values).update(data_offsets=[0, 2**40]))),
    ("a weight missing", header(lambda values: values.pop(next(key for key in values if key != "__metadata__")))),
    ("a header of a huge length", lambda model: put(model / "model.safetensors", b"\xff" * 8 + b"{}")),
    ("a header that is no JSON", lambda model: put(model / "model.safetensors", (2).to_bytes(8, "little") + b"[[")),
    ("an empty file", lambda model: put(model / "model.safetensors", b"")),
    ("NaN in the weights", broken_weights(b"\x00\x00\xc0\x7f")),
    ("infinities in the weights", broken_weights(b"\x00\x00\x80\x7f")),
    ("a pickle under that name", lambda model: put(model / "model.safetensors", PICKLE)),
    (
        "a folder under that name",
        lambda model: ((model / "model.safetensors").unlink(), (model / "model.safetensors").mkdir()),
    ),
    (
        "a link to nothing",
        lambda model: ((model / "model.safetensors").unlink(), (model / "model.safetensors").symlink_to("x")),
    ),
    ("no file", lambda model: (model / "model.safetensors").unlink()),
)
GIVEN_CASES = (
    given("nothing wrong", lambda _: None, "accepted"),
    given("unknown model_type with code of its own", with_code("AutoModelForCausalLM", "own_model"), "refused"),
    given("unknown model_type with a config of its own", with_code("AutoConfig", "own_model"), "refused"),
    given("a known model_type with code of its own", with_code("AutoModelForCausalLM", "llama"), "either"),
    given("a tokenizer with code of its own", tokenizer_with_code, "either"),
    given(
        "code in another repository", with_key("config.json", "auto_map", {"AutoConfig": "a/b--code.Model"}), "either"
    ),
    given("only pytorch_model.bin", only_pickle, "refused"),
    given("pytorch_model.bin beside the weights", lambda model: put(model / "pytorch_model.bin", PICKLE), "accepted"),
    given("no config.json", lambda model: (model / "config.json").unlink(), "refused"),
    given("no tokenizer.json", lambda model: (model / "tokenizer.json").unlink(), "refused"),
    given("no tokenizer_config.json", lambda model: (model / "tokenizer_config.json").unlink()),
    given("no chat template", lambda model: (model / "chat_template.jinja").unlink(), "refused"),
    given("an EOS token that is not there", lambda _: None, "refused", settings={"eos_token": "<|none|>"}),
    given(
        "config.json that cannot be read", lambda model: (model / "config.json").chmod(0), "refused", unprivileged=True
    ),
    given("a closed folder", lambda model: model.chmod(0), "refused", unprivileged=True),
    *(given(f"weights with {what}", act, "refused") for what, act in HEADERS),
    *(given(f"index: {what}", with_index(text), "refused") for what, text in INDEXES),
    *(
        given(f"config.json {key} is {value!r}"[:90], with_key("config.json", key, value))
        for key, value in CONFIG_VALUES
    ),
    *(
        given(f"tokenizer_config.json {key} is {value!r}"[:90], with_key("tokenizer_config.json", key, value))
        for key, value in TOKENIZER_VALUES
    ),
)
WHOLE_FILES: tuple[tuple[str, str], ...] = (
    *(("is an empty list", "[]"), ("is null", "null"), ("is a text", '"x"'), ("is empty", ""), ("is no JSON", "{")),
    *(("is nested deeply", "[" * 100_000), ("holds a huge integer", '{"x": ' + "9" * 5000 + "}")),
)


def write_file(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: put(model / name, text)


FILE_CASES = (
    *(given(f"{name} {what}", write_file(name, text)) for name in JSON_FILES for what, text in WHOLE_FILES),
    *(
        made(f"{name} {what}", model, stage, write_file(name, text))
        for model, stage in READ_BY
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
        for what, text in WHOLE_FILES
    ),
    *(
        made(f"weights with {what}", model, stage, act, "refused")
        for model, stage in READ_BY[1:]
        for what, act in HEADERS
    ),
    *(
        made(f"config.json without {key}", model, stage, without_key("config.json", key))
        for model, stage in READ_BY
        for key in ("pad_token_id", "eos_token_id", "vocab_size", "model_type", "architectures", "hidden_size")
    ),
    *(
        made(
            "config.json with code of its own", model, stage, with_code("AutoModelForCausalLM", "own_model"), "refused"
        )
        for model, stage in READ_BY
        if stage != "tokenize_data@sft"  # which has no use for the model
    ),
    *(
        made(
            f"config.json {key} is {value!r}"[:90], "models/base", "train_sft@sft", with_key("config.json", key, value)
        )
        for key, value in CONFIG_VALUES
    ),
    *(made("no folder", model, stage, shutil.rmtree, "refused") for model, stage in READ_BY),
)


def mutated(draw: random.Random) -> Case:
    """One place of one file of a model changed."""
    model, stage = draw.choice((*READ_BY, ("", "")))
    name = draw.choice([name for name in FILES if model != "models/rm" or name != "generation_config.json"])
    place = draw.random()
    as_tree = name in JSON_FILES and draw.random() < 0.75

    def act(model: Path) -> None:
        again = random.Random(place)
        content = (model / name).read_bytes()
        if as_tree:
            put(model / name, json_text(mutated_tree(json.loads(content), again)[1]))
        else:
            put(model / name, mutated_bytes(content, again)[1])

    what = f"{name} with one {'value' if as_tree else 'run of bytes'} changed ({place})"
    if not model or draw.random() < 0.4:
        return given(what, act)
    return made(what, model, stage, act)


AREA = Area(
    needs=("data", "models"),
    named=GIVEN_CASES,
    systematic=FILE_CASES,
    mutated=mutated,
    share=0.1,
)
