"""The path to the Hugging Face Hub, with the loading code as it is against a server on loopback."""

import gzip
import json
import math
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from stages.lib.settings.sections import default_params
from tests.hub_server import HubRepository, HubServer, hub_environment, repository_of_folder
from tests.pipeline.graph import stage_names
from tests.stages.test_prepare_data import FILES, prepare, prepared, refused, write_raw
from tests.stages.tiny_pipeline import PROJECT, call, change, lay_over, new_project, read_yaml, start, write_yaml
from tests.stages.tiny_qwen import save_qwen

DATA = "Anthropic/hh-rlhf"
DATA_COMMIT = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
MODEL = "Qwen/Qwen2.5-0.5B"
MODEL_COMMIT = "060db6499f32faf8b98477b0a26969ef7d8b9987"
SECTION = {
    "source": "hub",
    "path": "data/raw/none",
    "hub_dataset": DATA,
    "hub_revision": DATA_COMMIT,
    "hub_data_dir": "harmless-base",
    "format": "hh",
}


def transcripts(first, count):
    """HH rows that differ by number; every tenth has an empty chosen reply."""
    rows = []
    for number in range(first, first + count):
        asked = f"\n\nHuman: question {number}?\n\nAssistant: which?\n\nHuman: “{number}”\n\nAssistant:"
        good = "" if number % 10 == 9 else f" good {number}"
        rows.append({"chosen": asked + good, "rejected": f"{asked} bad {number}"})
    return rows


def compressed(rows):
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_qwen(folder)
    return folder


@pytest.fixture(scope="module")
def hub(model_folder):
    files = {
        "README.md": b"---\nlicense: mit\n---\n# Preferences\n",
        "harmless-base/train.jsonl.gz": compressed(transcripts(0, 30)),
        "harmless-base/test.jsonl.gz": compressed(transcripts(30, 10)),
        "helpful-base/train.jsonl.gz": compressed(transcripts(100, 10)),
    }
    data = HubRepository("datasets", DATA, DATA_COMMIT, files)
    with HubServer([data, repository_of_folder("models", MODEL, MODEL_COMMIT, model_folder)]) as server:
        yield server


def test_a_data_set_is_prepared_as_the_same_rows_in_a_file_are(hub, tmp_path):
    process = prepare(tmp_path / "hub", "data/raw/none", env=hub.environment(tmp_path / "cache"), **SECTION)
    rows_of, metrics = prepared(process, tmp_path / "hub")
    assert (metrics["raw_rows"], metrics["dropped/empty_reply"]) == (40, 4)
    assert len(rows_of["preference/train"]) + len(rows_of["preference/eval"]) == 36
    raw = write_raw(tmp_path / "local", transcripts(0, 40))
    local = prepared(prepare(tmp_path / "local", raw), tmp_path / "local")
    assert (rows_of, metrics) == local
    assert all(rows_of[name] for name in FILES)
    assert any(DATA_COMMIT in request and "harmless-base/train.jsonl.gz" in request for request in hub.requests)
    assert not any("helpful-base" in request for request in hub.requests)


def test_one_split_of_a_data_set_is_read(hub, tmp_path):
    env = hub.environment(tmp_path / "cache")
    process = prepare(tmp_path, "data/raw/none", env=env, **SECTION | {"hub_split": "test"})
    rows_of, metrics = prepared(process, tmp_path)
    assert metrics["raw_rows"] == 10
    numbers = [row["prompt"][-1]["content"] for row in rows_of["prompts/train"] + rows_of["prompts/eval"]]
    assert sorted(numbers) == [f"“{number}”" for number in range(30, 39)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hub_dataset": "Anthropic/none"}, "Anthropic/none"),
        ({"hub_revision": "f" * 40}, "f" * 40),
        ({"hub_data_dir": "nowhere"}, "folder nowhere"),
        ({"hub_split": "validation"}, "validation"),
    ],
)
def test_what_the_hub_does_not_have_is_one_message(hub, tmp_path, changes, named):
    folder = tmp_path / "run"
    process = prepare(folder, "data/raw/none", env=hub.environment(tmp_path / "cache"), **SECTION | changes)
    refused(process, folder, named, "could not be loaded from the Hub")


def test_a_hub_out_of_reach_is_one_message(tmp_path):
    env = hub_environment("http://127.0.0.1:9", tmp_path / "cache")  # the port that discards, where nobody listens
    folder = tmp_path / "run"
    process = prepare(folder, "data/raw/none", env=env, **SECTION)
    refused(process, folder, DATA, "could not be loaded from the Hub", "network")


LOAD = f"""
import sys
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = snapshot_download({MODEL!r}, revision={MODEL_COMMIT!r})
for source, options in ((folder, {{}}), ({MODEL!r}, {{"revision": {MODEL_COMMIT!r}}})):
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    ids = tokenizer("question 7?", return_tensors="pt").input_ids
    print(type(model).__name__, tokenizer.decode(ids[0]), model(ids).logits.sum().item())
"""


def test_a_model_is_loaded_by_name_and_by_snapshot(hub, tmp_path, model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    env = hub.environment(tmp_path / "cache")
    process = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    ids = AutoTokenizer.from_pretrained(model_folder)("question 7?", return_tensors="pt").input_ids
    total = AutoModelForCausalLM.from_pretrained(model_folder)(ids).logits.sum().item()
    lines = process.stdout.strip().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("Qwen2ForCausalLM question 7? ")
        assert float(line.split()[-1]) == pytest.approx(total, abs=1e-5)


SHORT = {
    "prepare_data": {"eval_fraction": 0.3},
    "tokenize_data": {"max_length": 128, "max_prompt_length": 112},
    "train_sft": {"epochs": 1.0, "batch_size": 8, "optimizer": {"learning_rate": 1e-3}},
    "train_rm": {"epochs": 1.0, "batch_size": 8},
    "train_dpo": {"epochs": 1.0, "batch_size": 8},
    "train_ppo": {"iterations": 2, "rollout_batch_size": 4, "minibatch_size": 4, "max_new_tokens": 8},
    "train_grpo": {"iterations": 2, "rollout_batch_size": 2, "samples_per_prompt": 2, "minibatch_size": 4}
    | {"max_new_tokens": 8},
    "evaluate": {"max_prompts": 4, "max_new_tokens": 8, "bootstrap_resamples": 200},
}


@pytest.mark.slow
def test_the_profile_goes_from_the_hub_to_the_report(hub, tmp_path):
    """qwen2.5-0.5b-hh with its own names, revisions and precisions, and a smaller model behind the name."""
    folder = new_project(tmp_path)
    settings = default_params()
    lay_over(settings, read_yaml(PROJECT / "profiles/qwen2.5-0.5b-hh.yaml"))
    write_yaml(folder / "params.yaml", settings)
    change(folder / "params.yaml", SHORT)
    for stage in stage_names()[:3]:
        process = start(folder, stage, base_environment=hub.environment(tmp_path / "cache"))
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    for stage in stage_names()[3:]:
        call(folder, stage)
    first = pd.read_csv(folder / "metrics/curves/train_dpo.csv").iloc[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("sft", "rm", "dpo", "ppo", "grpo"):
        tensors = load_file(folder / f"models/{name}/model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((folder / "models/ppo/config.json").read_text())
    assert config["eos_token_id"] == 2  # <|im_end|>, not the <|endoftext|> of the model as it came
    assert (folder / "metrics/report.html").is_file()
