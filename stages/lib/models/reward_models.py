"""Loading a reward model, by whomever it was made, as a module that scores sequences; and as the start of a critic."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from stages.lib.command.errors import StageError, one_line
from stages.lib.models.model_facts import read_config
from stages.lib.models.pretrained import Loading, load_as, load_classifier, new_classifier
from stages.lib.models.reward_head import (
    KNOWN_HEADS,
    HeadReading,
    RewardHead,
    ScoreScale,
    find_any_head,
    labels,
    linear_layers,
)
from stages.lib.models.scalar_scores import ClassifierScores, HeadOnBody, SequenceScores
from stages.lib.models.tokenizer_files import has_same_tokenizer
from stages.lib.models.weights_files import read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_scores(path: Path, head: RewardHead, loading: Loading, *, shares_tokens: bool) -> nn.Module:
    """A module of scores with the inputs of `SequenceScores.forward`. Raises StageError if it cannot be loaded.

    Args:
        shares_tokens: the policy's tokenizer is its own too, and so its pad token, which stands for no text: a decoder
            of one label is then read at the last token. From elsewhere a classifier is read by its own forward pass.
    """
    if head.layer is not None:
        return SequenceScores(cast("PreTrainedModel", load_with_head(path, head, loading)))
    if shares_tokens and reads_last_token(path, head):
        return SequenceScores(load_classifier(path, loading))
    from transformers import AutoModelForSequenceClassification

    whole = replace(loading, quantization=None)  # which would reach a head that is no single layer
    return ClassifierScores(load_as(AutoModelForSequenceClassification, path, whole, unread=tell_unread), head.label)


def reads_last_token(path: Path, head: RewardHead) -> bool:
    """Whether the score is a linear layer's on the last token's hidden state, if the pad id stands for no text."""
    return head.layer is not None or has_scalar_score(path)


def has_scalar_score(path: Path) -> bool:
    """Whether the classifier's head is one linear layer with one output, as those of decoders are."""
    return len(labels(read_config(path), path)) == 1 and linear_layers(path).get("score") == 1


def load_with_head(path: Path, head: RewardHead, loading: Loading) -> HeadOnBody:
    """The body of a model, and one output of one of its linear layers."""
    from transformers import AutoModel

    layer = head.layer or "score"
    weight, bias = (read_tensor(path, f"{layer}.{part}") for part in ("weight", "bias"))
    if weight is None or not torch.isfinite(weight).all():
        raise StageError(f"{path}: its layer {layer} holds NaN or infinite numbers")
    weight = weight[head.label : head.label + 1] / head.scale
    bias = None if bias is None else bias[head.label : head.label + 1]
    if (head.shift, head.scale) != (0.0, 1.0):
        bias = ((torch.zeros(1) if bias is None else bias) - head.shift) / head.scale
    body = load_as(AutoModel, path, loading, unread=lambda _names, _path: None)  # heads, this one among them
    return HeadOnBody(body, weight, bias)


def load_reward_start(path: Path, loading: Loading, seed: int) -> "PreTrainedModel":
    """What a reward model starts from: another one's body and head, or a language model's body with a new head.

    Args:
        seed: of the new head, N(0, 1/(d+1)²).
    Raises:
        StageError: it has a head of another kind, which would be lost, or cannot be loaded.
    """
    is_classifier = "SequenceClassification" in str(read_config(path).get("architectures"))
    others = [name for name in KNOWN_HEADS if name != "score" and linear_layers(path).get(name) == 1]
    if others or (is_classifier and not has_scalar_score(path)):
        head = f"its layer {others[0]}" if others else "a classifier with another head than that"
        raise StageError(
            f"{path}: a reward model starts from a language model, or from one whose head is a layer named score with "
            f"one output and no bias, and this is {head}: such a head cannot be trained on"
        )
    if not is_classifier:
        return new_classifier(path, loading, seed)
    classifier = load_classifier(path, loading)
    for name in ScoreScale._fields:  # which are those of other weights
        if hasattr(classifier.config, name):
            delattr(classifier.config, name)
    return classifier


def load_critic_start(path: Path, reading: HeadReading, loading: Loading, seed: int, policy: Path) -> nn.Module:
    """What a critic starts from: a reward model's body and head, or a language model's body with a new head.

    Args:
        seed: of the new head, N(0, 1/(d+1)²).
    Raises:
        StageError: it has another tokenizer than the policy, whose tokens it is to judge, or sees what comes after one.
    """
    if not has_same_tokenizer(path, policy):
        raise StageError(
            f"{path} has another tokenizer than {policy}, and a critic judges each of the policy's tokens: let critic "
            f"name {policy} (its body with a new head), or a reward model that was trained from it"
        )
    head = find_any_head(path, reading)
    if head is None:
        return new_classifier(path, loading, seed)
    if head.layer is None and has_scalar_score(path):
        return load_classifier(path, loading)
    if head.layer is None and "score" not in linear_layers(path):
        raise StageError(
            f"{path} has no head that could judge each token, as classifiers of encoders have none; let critic name "
            f"{policy} (its body with a new head)"
        )
    return load_with_head(path, head, loading)


def tell_unread(names: Iterable[str], path: Path) -> None:
    """Warn of weights of a given classifier that its class has no place for."""
    unread = sorted(map(str, names))
    if unread:
        print(
            one_line(f"warning: {path}: {len(unread)} of its weights are not read, the first is {unread[0]}"),
            file=sys.stderr,
        )
