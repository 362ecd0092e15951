"""The profiles of RL, cut short, from a Hub to the report: real reviews and problems, small models behind the names.

The classifier of gpt2-imdb is trained here, on sentences of other reviews than those that the prompts are taken from.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.film_sentiment import reviews, save_sentiment
from tests.given_reward_models import save_classifier, save_tokenizer
from tests.hub_server import HubRepository, HubServer, repository_of_folder
from tests.real_files import real_file
from tests.stages.test_profiles import PROMPTS, ROWS, json_lines, made, metrics, rows
from tests.stages.tiny_qwen import save_qwen
from tests.tables import rollout_rows

pytestmark = pytest.mark.slow
IMDB = ("stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31")
GSM8K = ("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866")
QWEN = ("Qwen/Qwen2.5-1.5B-Instruct", "989aa7980e4cf806f80c7fef2b1adb7bc71aa306")
UNNAMED = "0" * 40


def save_gpt2(folder: Path) -> None:
    """A small GPT-2 with random weights and GPT-2's own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(real_file("tokenizers/gpt2"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)


def save_instruct(folder: Path) -> None:
    """A small Qwen whose EOS is the token that ends a reply of its template, as that of Qwen2.5-Instruct."""
    folder.mkdir(parents=True)
    save_qwen(folder, positions=512)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": "<|im_end|>"}))


def test_gpt2_imdb(tmp_path: Path) -> None:
    of = reviews()
    base, classifier = tmp_path / "hub/gpt2", tmp_path / "hub/distilbert"
    save_gpt2(base)
    assert save_sentiment(classifier, of[400:]) > 0.57  # in 2000 sentences guessing has a deviation of 0.011
    lines = json_lines(lambda number: {"text": of[number][0], "label": of[number][1]}, ROWS)
    repositories = [
        HubRepository("datasets", *IMDB, {"plain_text/train.jsonl": lines}),
        repository_of_folder("models", "lvwerra/gpt2-imdb", UNNAMED, base),
        repository_of_folder("models", "lvwerra/distilbert-imdb", UNNAMED, classifier),
    ]
    with HubServer(repositories) as server:
        project = made(tmp_path, "gpt2-imdb", lambda _: None, server.environment(tmp_path / "cache"))
    rollouts = rollout_rows(project, "ppo")
    assert {len(rollout["response_ids"]) for rollout in rollouts} == {16}
    assert not any(rollout["ended"] for rollout in rollouts)
    samples = rows(project / "data/samples/ppo.jsonl")
    assert {row["length"] for row in samples} == {16}
    prompts = [row["prompt"] for row in samples]
    assert all(any(text.startswith(prompt) for text, _ in of[:ROWS]) for prompt in prompts)
    assert metrics(project, "score_samples/ppo")["prompts"] == PROMPTS
    assert "positive" in (project / "metrics/report.html").read_text()


def test_qwen_ppo_by_a_reward_model_with_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, reward = tmp_path / "hub/qwen", tmp_path / "hub/reward"
    save_instruct(base)
    reward.mkdir()
    save_classifier(reward, "llama", max_position_embeddings=512)
    save_tokenizer(reward, longest=512)

    def asked(number: int) -> dict[str, object]:
        messages = [{"role": "user", "content": f"question {number}?"}]
        return {"context_messages": messages, "context": "", "dataset": "a", "id": f"{number}"}

    repositories = [
        HubRepository("datasets", "OpenRLHF/prompt-collection-v0.1", UNNAMED, {"train.jsonl": json_lines(asked, 60)}),
        repository_of_folder("models", *QWEN, base),
        repository_of_folder("models", "OpenRLHF/Llama-3-8b-rm-mixture", UNNAMED, reward),
    ]
    with HubServer(repositories) as server:
        project = made(tmp_path, "qwen2.5-1.5b-ppo", lambda _: None, server.environment(tmp_path / "cache"))
    said = capsys.readouterr()
    assert "text is encoded with its own tokenizer" in said.out + said.err
    assert metrics(project, "training/ppo")["iterations"] == 2
    assert (project / "metrics/report.html").is_file()


def test_qwen_grpo_by_a_verifier(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = tmp_path / "hub/qwen"
    save_instruct(base)
    splits = ("train", "test")
    files = {f"main/{split}.jsonl": (real_file("data/gsm8k") / f"{split}.jsonl").read_bytes() for split in splits}
    listed = "".join(f"  - split: {split}\n    path: main/{split}.jsonl\n" for split in splits)
    files["README.md"] = f"---\nconfigs:\n- config_name: main\n  data_files:\n{listed}---\n".encode()
    repositories = [HubRepository("datasets", *GSM8K, files), repository_of_folder("models", *QWEN, base)]
    with HubServer(repositories) as server:
        hub, longer = server.environment(tmp_path / "cache"), {"max_prompt_length": 480, "max_length": 512}
        project = made(tmp_path, "qwen2.5-1.5b-gsm8k-grpo", lambda _: None, hub, **longer)
    rollouts = rollout_rows(project, "grpo")
    assert len(rollouts) == 16
    assert [rollout["sample"] for rollout in rollouts] == [*range(8)] * 2
    for policy in ("base", "grpo"):
        assert metrics(project, f"evaluate/{policy}")["reward_of_answer_mean"] == 0  # of random weights, so that
    said = capsys.readouterr().out
    assert "train_grpo@grpo: phase 1: Groups have no variance: 1 (group/without_variance above 0.5)" in said
    assert "Groups have no variance in 2 of 2 phases" in (project / "metrics/report.html").read_text()
