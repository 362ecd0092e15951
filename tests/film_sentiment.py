"""Real film reviews, and a classifier of their sentences trained here: a small DistilBERT with a label POSITIVE."""

import random
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

from tests.real_files import real_file

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


def save_sentiment(folder: Path, of: list[Review], train_sentences: int = 16000) -> float:
    """A DistilBERT trained on sentences of reviews. Returns its accuracy on those of the last 200, not seen before."""
    train, test = sentences(of[:-200])[:train_sentences], sentences(of[-200:])[:2000]
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
