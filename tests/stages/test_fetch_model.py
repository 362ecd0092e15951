"""A model of the Hub that is used as it is: its bytes, the check of what may be brought, and its way into a reward."""

import json
import subprocess
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from tests.hub_server import HubServer, repository_of_folder
from tests.loaded_python import loaded_python
from tests.real_files import PROJECT

COMMIT = "060db6499f32faf8b98477b0a26969ef7d8b9987"


def reward_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=32, num_labels=1, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    (folder / "README.md").write_text("# A judge\n")
    return folder


def fetched(folder: Path, server: HubServer, revision: str = COMMIT) -> subprocess.CompletedProcess:
    folder.mkdir()
    entry = {"judge": {"model": "some/judge", "revision": revision}}
    (folder / "params.yaml").write_text(json.dumps({"trust_remote_code": False, "fetch_model": entry}))
    environment = {**server.environment(folder / "cache"), "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        [*loaded_python(environment), "-m", "stages.fetch_model", "--out", "models"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_comes_as_it_is(tmp_path: Path) -> None:
    source = reward_model(tmp_path / "source")
    with HubServer([repository_of_folder("models", "some/judge", COMMIT, source)]) as server:
        done = fetched(tmp_path / "project", server)
        assert done.returncode == 0, done.stderr
        other = fetched(tmp_path / "other", server, "0" * 40)
    folder = tmp_path / "project/models/judge"
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
        assert not (folder / name).is_symlink()
    assert other.returncode == 2
    line = other.stderr.splitlines()[-1]
    assert line.startswith(f"error: Hub model some/judge at revision {'0' * 40} cannot be downloaded (")


def test_weights_that_are_pickles_are_not_brought(tmp_path: Path) -> None:
    source = reward_model(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with HubServer([repository_of_folder("models", "some/judge", COMMIT, source)]) as server:
        done = fetched(tmp_path / "project", server)
    assert done.returncode == 2
    message = "error: Hub model some/judge has no weights in safetensors files, and no others are read"
    assert done.stderr.splitlines()[-1] == message  # after the Hub's own progress
    assert not (tmp_path / "project/models/judge").exists()
