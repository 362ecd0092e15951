"""The JSON schemas are those of the models, and say of a file what the models say."""

import json
from copy import deepcopy
from typing import Any

import pytest

from stages.lib.command.strict_yaml import load_yaml
from stages.lib.settings.declaration import block
from stages.lib.settings.preference_loss import IpoLoss, MixtureLoss, SigmoidLoss
from stages.lib.settings.schemas import params_schema, runtime_schema
from stages.lib.settings.sections import default_params
from stages.tools.use_profile import settings_of
from stages.tools.write_schemas import SCHEMAS, schema_text
from tests.real_files import PROJECT

jsonschema = pytest.importorskip("jsonschema")
FILES = {"params.yaml": params_schema, "runtime.yaml": runtime_schema}


def faults(name: str, document: Any) -> list[str]:
    checker = jsonschema.Draft202012Validator(FILES[name]())
    return [f"{error.json_path}: {error.message}" for error in checker.iter_errors(document)]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_committed_schemas_are_current(name: str) -> None:
    schema = SCHEMAS[name]()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert (PROJECT / "schemas" / name).read_text(encoding="utf-8") == schema_text(schema), "make schemas"


@pytest.mark.parametrize("name", FILES)
def test_the_committed_files_keep_to_their_schemas_and_name_them(name: str) -> None:
    assert faults(name, load_yaml(PROJECT / name)) == []
    first = (PROJECT / name).read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# yaml-language-server: $schema=schemas/{name.removesuffix('.yaml')}.schema.json"
    assert (PROJECT / first.partition("=")[2]).is_file()


@pytest.mark.parametrize("profile", sorted((PROJECT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_profile_keeps_to_the_schema(profile: Any) -> None:
    assert faults("params.yaml", settings_of(profile)) == []


WRONG = {
    "train_dpo.dpo.loss": block(IpoLoss) | {"label_smoothing": 0.0},
    "train_dpo.dpo.losss": block(IpoLoss),
    "train_ppo.ppo.kl.controller": {"type": "adaptive", "coef": 0.1},
    "train_sft.sft.optimizer.beta1": 1.0,
    "train_sft.sft.lora": {"rank": 4},
    "train_rm.rm.keep": "bset",
    "prepare_data.kinds": ["sft", "pairs"],
    "evaluate.max_prompts": 0,
    "evaluate.policies": ["sft"],
    "seed": -1,
}
RIGHT = {
    "train_dpo.dpo.loss": block(MixtureLoss),
    "train_ppo.ppo.kl.controller": {"type": "adaptive", "coef": 0.1, "target": 6, "horizon": 1e4},
    "train_sft.sft.lora": {
        "rank": 4,
        "alpha": 8,
        "targets": ["q_proj"],
        "experts": False,
        "routers": True,
        "rslora": True,
        "base_quantization": "nf4",
        "save_adapter": False,
    },
    "evaluate.max_prompts": None,
    "evaluate.policies": {"base": "models/base", "half-way": "models/dpo/step_200"},
}


def with_value(document: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    changed = deepcopy(document)
    *above, last = key.split(".")
    holder = changed
    for part in above:
        holder = holder[part]
    holder[last] = value
    return changed


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_told(key: str) -> None:
    assert len(faults("params.yaml", with_value(default_params(), key, WRONG[key]))) > 0


@pytest.mark.parametrize("key", RIGHT)
def test_a_right_value_is_not(key: str) -> None:
    assert faults("params.yaml", with_value(default_params(), key, RIGHT[key])) == []


def test_a_missing_key_is_told_as_keys_are_never_filled_in() -> None:
    changed = default_params()
    del changed["train_sft"]["sft"]["lora"]
    assert faults("params.yaml", changed) == ["$.train_sft.sft: 'lora' is a required property"]


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({"train_ppo": {"micro_batch_tokens": 4096}}, True),
        ({"train_ppo": None}, True),
        ({"train_ppo": {"deepspeed": {"zero_optimization": {"overlap_comm": True, "x": [1, 2.5]}}}}, True),
        ({"train_ppo": {"micro_batch_token": 4096}}, False),
        ({"train_pppo": {"micro_batch_tokens": 4096}}, False),
        ({"default": {"threads": 2}}, False),
    ],
)
def test_a_stage_overrides_some_keys_of_a_whole_default(changes: dict[str, Any], right: bool) -> None:
    assert (faults("runtime.yaml", load_yaml(PROJECT / "runtime.yaml") | changes) == []) == right


def test_schemas_say_what_an_editor_shows() -> None:
    loss = params_schema()["$defs"]["TrainDpo"]["properties"]["loss"]
    assert loss["default"] == block(SigmoidLoss, beta=0.2)
    target = params_schema()["$defs"]["AdaptiveKl"]["properties"]["target"]
    assert target["description"] == "[nats per response] KL to hold"
    assert json.loads(schema_text(runtime_schema())) == runtime_schema()
