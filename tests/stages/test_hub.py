"""The path to the Hugging Face Hub, with the loading code as it is against a server on loopback."""

import gzip
import json
import subprocess

import pytest

from tests.hub_server import HubRepository, HubServer, hub_environment, repository_of_folder
from tests.loaded_python import loaded_python
from tests.real_files import PROJECT
from tests.stages.data_stages import lines, read, settings, sources_of, write_rows
from tests.stages.tiny_qwen import save_qwen

DATA = "Anthropic/hh-rlhf"
DATA_COMMIT = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
MODEL = "Qwen/Qwen2.5-0.5B"
MODEL_COMMIT = "060db6499f32faf8b98477b0a26969ef7d8b9987"
SOURCE = {
    "dataset": DATA,
    "revision": DATA_COMMIT,
    "data_dir": "harmless-base",
    "format": "hh",
    "kinds": ["sft", "preference", "prompts"],
}
PARTS, PARTS_COMMIT = "owner/parts", "1" * 40


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
    answers = [json.dumps({"instruction": f"ask {n}", "output": "yes"}) + "\n" for n in range(80)]
    parts = {f"train-{n}.jsonl": "".join(answers[20 * n : 20 * n + 20]).encode() for n in range(4)}
    more = HubRepository("datasets", PARTS, PARTS_COMMIT, parts)
    with HubServer([data, more, repository_of_folder("models", MODEL, MODEL_COMMIT, model_folder)]) as server:
        yield server


def read_hub(folder, env, **changed):
    """Run read_source on one Hub source, in a process of its own."""
    settings(folder, sources_of(hub={"own": SOURCE | changed}))
    return subprocess.run(
        [*loaded_python(env), "-m", "stages.read_source", "--out", "data/sources", "--metrics", "metrics/read_source"],
        cwd=folder,
        env={**env, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )


def rows_and_metrics(done, folder):
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "metrics/read_source/own.json").read_text())
    return lines(folder / "data/sources/own/rows.jsonl"), metrics


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_read_as_the_same_rows_in_a_file_are(hub, tmp_path, streaming):
    folder = tmp_path / "hub"
    rows, metrics = rows_and_metrics(read_hub(folder, hub.environment(tmp_path / "cache"), streaming=streaming), folder)
    assert (metrics["rows_read"], metrics["dropped/empty_reply"], metrics["preference/rows"]) == (40, 4, 36)
    path = write_rows(tmp_path / "raw.jsonl", transcripts(0, 40))
    settings(tmp_path / "local", sources_of(files={"own": {"path": path, "kinds": SOURCE["kinds"]}}))
    assert read(tmp_path / "local", "own")[:2] == (rows, metrics)
    assert any(DATA_COMMIT in request and "harmless-base/train.jsonl.gz" in request for request in hub.requests)
    assert not any("helpful-base" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("changed", "numbers"),
    [
        ({"hub_split": "test"}, range(30, 40)),
        ({"hub_split": "train[10:15]"}, range(10, 15)),
        ({"hub_split": "train[:10%]"}, range(3)),
        ({"hub_split": "train[5:]", "max_rows": 2}, range(5, 7)),
        ({"hub_split": "train[10:15]", "streaming": True}, range(10, 15)),
        ({"hub_split": "train[25:]", "streaming": True}, range(25, 30)),
        ({"hub_split": "test", "streaming": True, "max_rows": 4}, range(30, 34)),
    ],
)
def test_a_split_and_rows_of_one_are_read(hub, tmp_path, changed, numbers):
    rows, metrics = rows_and_metrics(read_hub(tmp_path, hub.environment(tmp_path / "cache"), **changed), tmp_path)
    assert metrics["rows_read"] == len(numbers)
    asked = [row["prompt"][-1]["content"] for row in rows if row["kind"] == "prompts"]
    assert asked == [f"“{number}”" for number in numbers if number % 10 != 9]


def test_streaming_asks_for_no_file_beyond_the_rows_asked_for(hub, tmp_path):
    changed = {"dataset": PARTS, "revision": PARTS_COMMIT, "data_dir": None, "format": "auto", "kinds": ["sft"]}
    asked = {}
    for streaming in (True, False):
        before = len(hub.requests)
        env = hub.environment(tmp_path / f"cache-{streaming}")
        rows, _ = rows_and_metrics(read_hub(tmp_path, env, streaming=streaming, max_rows=30, **changed), tmp_path)
        assert [row["messages"][0]["content"] for row in rows] == [f"ask {number}" for number in range(30)]
        asked[streaming] = {
            part for part in range(4) for text in hub.requests[before:] if f"train-{part}.jsonl" in text
        }
    assert asked == {True: {0, 1}, False: {0, 1, 2, 3}}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"dataset": "Anthropic/none"}, "Anthropic/none"),
        ({"revision": "f" * 40}, "f" * 40),
        ({"data_dir": "nowhere"}, "folder nowhere"),
        ({"hub_split": "validation"}, "validation"),
        ({"config": "nothing"}, "config nothing"),
        ({"dataset": "Anthropic/none", "streaming": True}, "Anthropic/none"),
        ({"hub_split": "validation", "streaming": True}, "validation"),
    ],
)
def test_what_the_hub_does_not_have_is_one_message(hub, tmp_path, changed, named):
    done = read_hub(tmp_path / "run", hub.environment(tmp_path / "cache"), **changed)
    refused(done, named, "could not be loaded from the Hub")


def refused(done, *messages):
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    assert all(message in errors[0] for message in messages), errors


def test_a_hub_out_of_reach_is_one_message(tmp_path):
    env = hub_environment("http://127.0.0.1:9", tmp_path / "cache")  # the port that discards, where nobody listens
    refused(read_hub(tmp_path / "run", env), DATA, "could not be loaded from the Hub", "network")


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
    process = subprocess.run([*loaded_python(env), "-c", LOAD], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    ids = AutoTokenizer.from_pretrained(model_folder)("question 7?", return_tensors="pt").input_ids
    total = AutoModelForCausalLM.from_pretrained(model_folder)(ids).logits.sum().item()
    lines = process.stdout.strip().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("Qwen2ForCausalLM question 7? ")
        assert float(line.split()[-1]) == pytest.approx(total, abs=1e-5)
