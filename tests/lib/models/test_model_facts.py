"""What is known of a model before it is loaded, against what transformers says once torch is there."""

import json
import os
import subprocess
import sys

import pytest
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stages.lib.command.errors import StageError
from stages.lib.models.model_facts import (
    ALL_KERNELS,
    CAUSAL_MODELS,
    attention_kernels,
    read_config,
    read_model_facts,
    require_json_objects,
    table,
)
from tests.real_files import PROJECT


def test_every_causal_architecture_is_known_as_transformers_knows_it():
    types = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert dict(types) == table(CAUSAL_MODELS)
    for model_type in types:
        config = CONFIG_MAPPING[model_type]
        model = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[config]
        expected = {"eager"}
        expected |= {"sdpa"} if model._supports_sdpa else set()
        expected |= {"flash_attention_2"} if model._supports_flash_attn else set()
        facts = read_model_facts({"model_type": model_type})
        assert facts.attention_kernels == expected, model_type
        assert facts.has_classifier == (config in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING), model_type


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "gptj", "gpt_neo", "bloom"])
def test_architectures_without_sdpa(model_type):
    assert "sdpa" not in attention_kernels(model_type)
    assert {"sdpa", "eager"} <= attention_kernels("llama")


def test_of_an_unknown_architecture_only_its_own_word_is_known():
    facts = read_model_facts({"model_type": "own", "vocab_size": 7})
    assert facts == ("own", 7, None, False, ALL_KERNELS)
    own = {"auto_map": {"AutoModelForSequenceClassification": "modeling_own.Own"}}
    assert read_model_facts({"model_type": "own", **own}).has_classifier


def test_facts_need_no_torch():
    code = (
        "import sys; from stages.lib.models.model_facts import read_model_facts as facts; "
        "facts({'model_type': 'llama'}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"vocab_size": 5, "max_position_embeddings": 7}, (5, 7)),
        ({"vocab_size": 5, "n_positions": 8}, (5, 8)),
        ({"vocab_size": 5}, (5, None)),
        (  # LongRoPE: beyond these, all sequences of a batch get other angles
            {
                "vocab_size": 5,
                "max_position_embeddings": 700,
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 70},
            },
            (5, 70),
        ),
        (
            {
                "vocab_size": 5,
                "max_position_embeddings": 700,
                "original_max_position_embeddings": 60,
                "rope_scaling": {"type": "longrope"},
            },
            (5, 60),
        ),
        ({"vocab_size": 5, "max_position_embeddings": 700, "rope_parameters": {"rope_type": "llama3"}}, (5, 700)),
        ({"text_config": {"vocab_size": 6, "max_position_embeddings": 9}}, (6, 9)),
    ],
)
def test_limits_of_a_model(config, expected):
    facts = read_model_facts({"model_type": "llama", **config})
    assert (facts.vocab_size, facts.positions) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": None}, "expected a text as 'model_type', found nothing"),
        ({"model_type": ["llama"]}, "expected a text as 'model_type', found"),
        ({"vocab_size": "x"}, "expected a whole number as 'vocab_size', found 'x'"),
        ({"vocab_size": True}, "expected a whole number as 'vocab_size', found True"),
        ({"vocab_size": 0}, "expected a whole number from 1 to 2147483647 as 'vocab_size', found 0"),
        ({"vocab_size": 10**400}, "'vocab_size', found a number of more than 100 digits"),
        ({"max_position_embeddings": 7.5}, "expected a whole number as 'max_position_embeddings', found 7.5"),
        ({"num_hidden_layers": 10**9}, "expected a whole number from 1 to 10000 as 'num_hidden_layers'"),
        ({"hidden_size": 0}, "expected at least 1 as 'hidden_size', found 0"),
        ({"num_key_value_heads": -1}, "expected at least 1 as 'num_key_value_heads', found -1"),
        ({"rms_norm_eps": 1e300}, "expected a number from 0 to below 1 as 'rms_norm_eps', found 1e+300"),
        ({"layer_norm_epsilon": -1e-5}, "expected a number from 0 to below 1 as 'layer_norm_epsilon', found -1e-05"),
        ({"rms_norm_eps": float("nan")}, "expected a number from 0 to below 1 as 'rms_norm_eps', found nan"),
        ({"rope_scaling": "longrope"}, "expected an object as 'rope_scaling', found 'longrope'"),
        ({"rope_parameters": [1]}, "expected an object as 'rope_parameters'"),
        ({"text_config": []}, "expected an object as 'text_config', found []"),
        ({"auto_map": "x"}, "expected an object as 'auto_map', found 'x'"),
    ],
)
def test_values_of_no_sense(config, message):
    with pytest.raises(StageError) as refused:
        read_model_facts({"model_type": "llama", **config}, "x/config.json")
    assert str(refused.value).startswith("x/config.json: expected")
    assert message in str(refused.value)


def test_a_folder_without_a_configuration_is_not_a_model(tmp_path):
    with pytest.raises(StageError, match=r"is not a model folder: .*config\.json is missing"):
        read_config(tmp_path)
    with pytest.raises(StageError, match=r"is not a model folder: .*config\.json is missing"):
        read_config(tmp_path / "file")
    file = tmp_path / "config.json"
    for content, message in (
        (b"{\n x", r"config\.json, line 2: not valid JSON"),
        (b"[]", r"config\.json: expected a JSON object, found list"),
        (b"\xff{}", r"config\.json: not UTF-8 text"),
        (b"[" * 100_000, r"config\.json: not usable JSON \(brackets nested too deeply\)"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", r"config\.json: not usable JSON"),
    ):
        file.write_bytes(content)
        with pytest.raises(StageError, match=message):
            read_config(tmp_path)
    file.write_text(json.dumps({"model_type": "llama"}))
    assert read_config(tmp_path) == {"model_type": "llama"}
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(StageError, match=r"tokenizer_config\.json: expected a JSON object, found list"):
        require_json_objects(tmp_path, ("tokenizer.json", "tokenizer_config.json"))


def test_a_fifo_in_place_of_a_file_is_not_read(tmp_path):
    """Reading one waits for a writer who may never come."""
    os.mkfifo(tmp_path / "tokenizer.json")
    code = (
        "import sys; from pathlib import Path; from stages.lib.models.model_facts import require_json_objects; "
        "require_json_objects(Path(sys.argv[1]), ('config.json', 'tokenizer.json'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, check=False, capture_output=True, text=True, timeout=30)
    assert done.stderr.endswith("tokenizer.json is not a file\n")
