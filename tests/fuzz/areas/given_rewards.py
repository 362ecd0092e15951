"""Reward models from elsewhere: heads and labels that are not there, broken tokenizers, rows they cannot read."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from tests.fuzz.areas.models import HEADERS, JSON_FILES, WHOLE_FILES, edit, only_pickle, with_code, with_key, write_file
from tests.fuzz.areas.params import CHECK
from tests.fuzz.areas.templates import STATEMENTS
from tests.fuzz.case import Area, Case, Expected, put
from tests.fuzz.mutations import json_text, mutated_bytes, mutated_tree
from tests.given_reward_models import TEMPLATE, save_classifier, save_tokenizer, save_value_head

GIVEN = "data/raw/given"
LABELS = {0: "NEGATIVE", 1: "POSITIVE"}
STAGES = ("evaluate_rm@rm", "score_samples@dpo", "train_grpo@grpo")
EVALUATES = STAGES[0]


def classifier(kind: str = "distilbert", template: str | None = None, **changed: Any) -> Callable[[Path], None]:
    """Makes a classifier with a tokenizer of its own; of two labels unless other ones are given."""
    labels = changed.pop("labels", LABELS)

    def make(model: Path) -> None:
        positions = {"gpt2": {"n_positions": 512}}.get(kind, {"max_position_embeddings": 512})
        save_classifier(model, kind, labels=labels, **positions | changed)
        save_tokenizer(model, template=template, longest=512)

    return make


def value_head(layer: str, **more: Any) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        save_value_head(model, layer, bias=True, n_positions=128, **more)
        save_tokenizer(model)

    return make


def ours(model: Path) -> None:
    """The pipeline's own, brought as if it came from elsewhere."""
    shutil.copytree(model.parents[2] / "models/rm", model)


def settings_of(stage: str, head: Any, label: Any, path: str = GIVEN) -> dict[str, Any]:
    values = {"reward_model": path, "reward_head": head, "reward_label": label}
    section, _, entry = stage.partition("@")
    return {section: values if section == "score_samples" else {entry: values}}


def case(
    what: str,
    make: Callable[[Path], object],
    change: Callable[[Path], object],
    expected: Expected,
    *,
    head: Any = None,
    label: Any = "POSITIVE",
    stage: str = EVALUATES,
) -> Case:
    """A model that is made, and changed in one way."""

    def prepare(folder: Path) -> None:
        logging.disable_progress_bar()  # of writing weights
        logging.set_verbosity_error()
        (folder / GIVEN).parent.mkdir(parents=True, exist_ok=True)
        make(folder / GIVEN)
        change(folder / GIVEN)

    return Case(f"{stage}: {what}", prepare, (*CHECK, stage), expected, settings_of(stage, head, label))


def nothing_else(_: Path) -> None:
    """Changes nothing."""


def pairs_with(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the first prepared pair of the test split, whose text the model reads."""

    def act(model: Path) -> None:
        path = model.parents[2] / "data/prepared/test/preference.jsonl"
        first, *others = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        change(first)
        put(path, "".join(json_text(row) + "\n" for row in (first, *others)))

    return act


def first_sample(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(model: Path) -> None:
        path = model.parents[2] / "data/samples/dpo.jsonl"
        first, *others = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        change(first)
        put(path, "".join(json_text(row) + "\n" for row in (first, *others)))

    return act


TEMPLATED = classifier(template=TEMPLATE)
ONE_LABEL = classifier(labels=None)
SOUND = (
    *(case("a classifier of two labels", classifier(), nothing_else, "accepted", stage=stage) for stage in STAGES),
    *(case("one with a chat template", TEMPLATED, nothing_else, "accepted", stage=stage) for stage in STAGES),
    case("a classifier of one label", ONE_LABEL, nothing_else, "accepted", label=None),
    case("a head of TRL", value_head("v_head.summary"), nothing_else, "accepted", label=None),
    case("a head of OpenRLHF", value_head("value_head"), nothing_else, "accepted", label=None),
    *(case("ours", ours, nothing_else, "accepted", label=None, stage=stage) for stage in STAGES),
)
ODD_LABELS = (
    None,
    "positive",
    "",
    " ",
    "POSITIVE ",
    "LABEL_1",
    2,
    -1,
    1.0,
    True,
    [1],
    {},
    10**20,
    "1",
    "\ud800",
    "a\nb",
)
HEADS = (
    "",
    "none",
    "score",
    "v_head",
    "classifier.weight",
    "../x",
    "distilbert",
    5,
    True,
    ["classifier"],
    "a\nerror: b",
    "x" * 5000,
)
READING = (
    *(case(f"reward_label {label!r}", classifier(), nothing_else, "refused", label=label) for label in ODD_LABELS),
    *(
        case(f"reward_label {label!r}", classifier(), nothing_else, "accepted", label=label)
        for label in (0, 1, "NEGATIVE")
    ),
    *(case(f"reward_label {label!r}", ONE_LABEL, nothing_else, "refused", label=label) for label in ("POSITIVE", 1)),
    *(case(f"reward_head {head!r:.30}", classifier(), nothing_else, "refused", head=head) for head in HEADS),
    *(
        case(f"reward_head {head!r:.30}", value_head("value_head"), nothing_else, "refused", head=head)
        for head in HEADS
    ),
    case("two labels of one name", classifier(labels={0: "POSITIVE", 1: "POSITIVE"}), nothing_else, "refused"),
    *(
        case(f"{key} is {value!r}", classifier(), with_key("config.json", key, value), "either")
        for key, value in (
            *(
                ("id2label", value)
                for value in (None, [], {}, {"x": "POSITIVE"}, {"0": 5}, {"0": None, "1": ["POSITIVE"]}, 5)
            ),
            *(("num_labels", value) for value in (0, 1, 5, "x", None)),
            *(("architectures", value) for value in (None, [], ["DistilBertForMaskedLM"], [5], "x")),
            *(("problem_type", value) for value in ("regression", "x", 5)),
            *(("max_position_embeddings", value) for value in (4, 0, -1, "x", None)),
            *(("vocab_size", value) for value in (10, 0, 10**9, "x")),
            *(("pad_token_id", value) for value in (None, 10**9, -1, "x")),
            *(("model_type", value) for value in (None, "own_model", "llama", 5)),
        )
    ),
)
BROKEN = (
    *(case(f"weights with {what}", classifier(), act, "refused") for what, act in HEADERS),
    *(case(f"weights with {what}", value_head("value_head"), act, "refused", label=None) for what, act in HEADERS),
    *(
        case(f"{name} {what}", classifier(), write_file(name, text), "either")
        for name in JSON_FILES
        for what, text in WHOLE_FILES
    ),
    case("only a pickle", classifier(), only_pickle, "refused"),
    case("code of its own", classifier(), with_code("AutoModelForSequenceClassification", "own_model"), "refused"),
    case("no tokenizer", classifier(), lambda model: (model / "tokenizer.json").unlink(), "refused"),
    case("no config.json", classifier(), lambda model: (model / "config.json").unlink(), "refused"),
    case("no folder", classifier(), shutil.rmtree, "refused"),
    case(
        "a language model",
        lambda model: shutil.copytree(model.parents[2] / "models/sft", model),
        nothing_else,
        "refused",
    ),
    case("a reader of 8 tokens", classifier(max_position_embeddings=8), nothing_else, "refused"),
    case(
        "a tokenizer that stops at 8",
        classifier(),
        edit("tokenizer_config.json", lambda values: values.update(model_max_length=8)),
        "refused",
    ),
    *(
        case(f"a template that {what}", classifier(template=text + TEMPLATE), nothing_else, "either")
        for what, text in STATEMENTS
    ),
    case("a template of nothing", classifier(template="{{ '' }}"), nothing_else, "either"),
)
MESSAGE = {"role": "assistant", "content": "A."}


def of_rows(
    what: str, make: Callable[[Path], object], change: Callable[[Path], object], expected: Expected, **more: Any
) -> Case:
    """Rows that the model is to read, in a project whose settings are known to be sound."""
    found = case(what, make, change, expected, **more)
    return found._replace(stages=found.stages[1:])


ROWS = (
    *(
        of_rows(
            f"a pair whose {key} is {value!r}",
            classifier(),
            pairs_with(lambda row, key=key, value=value: row.update({key: value})),
            "refused",
        )
        for key in ("prompt", "chosen", "rejected")
        for value in (None, [], 5, "x", [5], [{}], [{"role": "assistant"}], [{"role": "critic", "content": "A."}], {})
    ),
    of_rows("a pair without a reply", classifier(), pairs_with(lambda row: row.pop("chosen")), "refused"),
    of_rows(
        "a pair with half a surrogate pair",
        classifier(),
        pairs_with(lambda row: row.update(chosen=[MESSAGE | {"content": "\ud800"}])),
        "either",
    ),
    of_rows(
        "a pair of 100,000 letters",
        classifier(),
        pairs_with(lambda row: row.update(chosen=[MESSAGE | {"content": "x" * 100_000}])),
        "refused",
    ),
    *(
        of_rows(
            f"a sample whose {key} is {value!r}",
            make,
            first_sample(lambda row, key=key, value=value: row.update({key: value})),
            "either",
            label=label,
            stage=STAGES[1],
        )
        for make, label in ((classifier(), "POSITIVE"), (ours, None))
        for key in ("prompt", "response", "prompt_ids", "response_ids", "reference_response", "row", "source")
        for value in (None, 5, "x", [], [-1], [10**6], [None], [{}], {})
    ),
    *(
        of_rows(
            f"a sample without {key}",
            make,
            first_sample(lambda row, key=key: row.pop(key)),
            "either",
            label=label,
            stage=STAGES[1],
        )
        for make, label in ((classifier(), "POSITIVE"), (ours, None))
        for key in ("prompt", "response", "prompt_ids", "response_ids", "reference_response", "row", "source")
    ),
)


def mutated(draw: random.Random) -> Case:
    """One place of one file of a sound model changed."""
    make, label = draw.choice(((classifier(), "POSITIVE"), (TEMPLATED, 1), (value_head("value_head"), None)))
    name = draw.choice(("config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"))
    place = draw.random()

    def act(model: Path) -> None:
        again = random.Random(place)
        content = (model / name).read_bytes()
        if name.endswith(".json") and again.random() < 0.75:
            put(model / name, json_text(mutated_tree(json.loads(content), again)[1]))
        else:
            put(model / name, mutated_bytes(content, again)[1])

    return case(f"{name} changed in one place ({place})", make, act, "either", label=label, stage=draw.choice(STAGES))


AREA = Area(
    needs=("data", "models"),
    named=(*SOUND, *READING, *BROKEN, *ROWS),
    mutated=mutated,
    share=0.05,
)
