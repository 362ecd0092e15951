"""The profiles of RL, cut short, from a Hub to the report: real reviews and problems, small models behind the names.

The classifier of gpt2-imdb is trained here, on sentences of other reviews than those that the prompts are taken from.
"""

import random
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from tests.hub_server import HubRepository, HubServer, repository_of_folder
from tests.real_files import real_file
from tests.stages.test_profiles import PROMPTS, ROWS, json_lines, made, metrics
from tests.tables import rollout_rows

pytestmark = pytest.mark.slow
IMDB = ("stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31")
GSM8K = ("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866")
QWEN = ("Qwen/Qwen2.5-1.5B-Instruct", "989aa7980e4cf806f80c7fef2b1adb7bc71aa306")
UNNAMED = "0" * 40
LONGEST = 64  # of the classifier, in words
Review = tuple[str, int]  # and whether it is positive


def reviews() -> list[Review]:
    """Real film reviews, a negative and a positive one in turn."""
    with zipfile.ZipFile(real_file("data/movie_reviews") / "movie_reviews.zip") as file:
        negative, positive = (sorted(name for name in file.namelist() if f"/{of}/cv" in name) for of in ("neg", "pos"))
        pairs = zip(negative, positive, strict=True)
        return [(file.read(name).decode(), label) for pair in pairs for label, name in enumerate(pair)]


def sentences(of: list[Review]) -> list[Review]:
    """Those of more than eight words, in any order."""
    found = [(line, label) for text, label in of for line in text.splitlines() if len(line.split()) > 8]
    random.Random(0).shuffle(found)
    return found


def save_sentiment(folder: Path, of: list[Review]) -> float:
    """A DistilBERT trained on sentences of reviews. Returns its accuracy on those of the last 200, not seen before."""
    train, test = sentences(of[:-200])[:16000], sentences(of[-200:])[:2000]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        (text for text, _ in train), trainers.WordLevelTrainer(vocab_size=3000, special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONGEST, **names)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 3000, "dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 1, "initializer_range": 0.05}
    quiet = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    model = DistilBertForSequenceClassification(
        DistilBertConfig(**sizes, **quiet, **labels, max_position_embeddings=LONGEST, pad_token_id=0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)

    def read(batch: list[Review]) -> dict[str, torch.Tensor]:
        texts = [text for text, _ in batch]
        found = fast(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {**found, "labels": torch.tensor([label for _, label in batch])}

    for start in range(0, len(train), 64):
        model(**read(train[start : start + 64])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        batch = read(test)
        return float((model(**batch).logits.argmax(dim=1) == batch["labels"]).double().mean())


def save_gpt2(folder: Path) -> None:
    """A small GPT-2 with random weights and GPT-2's own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(real_file("tokenizers/gpt2"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)


def test_gpt2_imdb(tmp_path: Path) -> None:
    of = reviews()
    base, classifier = tmp_path / "gpt2", tmp_path / "distilbert"
    save_gpt2(base)
    assert save_sentiment(classifier, of[400:]) > 0.57  # in 2000 sentences guessing has a deviation of 0.011
    lines = json_lines(lambda number: {"text": of[number][0], "label": of[number][1]}, ROWS)
    repositories = [
        HubRepository("datasets", *IMDB, {"plain_text/train.jsonl": lines}),
        repository_of_folder("models", "lvwerra/gpt2-imdb", UNNAMED, base),
        repository_of_folder("models", "lvwerra/distilbert-imdb", UNNAMED, classifier),
    ]
    with HubServer(repositories) as server:
        project = made(tmp_path / "project", "gpt2-imdb", lambda _: None, server.environment(tmp_path / "cache"))
    rollouts = rollout_rows(project, "ppo")
    print(rollouts[0])
    assert metrics(project, "score_samples/ppo")["prompts"] == PROMPTS
