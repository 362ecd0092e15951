"""Scalar scores of sequences and of their tokens: the reward model and the critic."""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional

from stages.lib.models.attention_masks import model_mask
from stages.lib.models.token_logprobs import at_least_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ScalarHead(nn.Linear):
    """A head with one output that computes in float32 or wider, whatever the dtype of its weights."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight.shape[1], 1, bias=bias is not None, device="meta")
        self.weight = weight
        if bias is not None:
            self.bias = bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, d) → (…, 1)."""
        bias = None if self.bias is None else at_least_float32(self.bias)
        return functional.linear(at_least_float32(input), at_least_float32(self.weight), bias)


class Scores(nn.Module):
    """A transformers sequence classifier with one output, or what has its parts.

    Args:
        classifier: `AutoModelForSequenceClassification` with `num_labels=1` and a head named `score`, which is replaced
            by a `ScalarHead` on the same weights; or a `HeadOnBody`.
    """

    classifier: "PreTrainedModel"

    def __init__(self, classifier: "PreTrainedModel") -> None:
        super().__init__()
        classifier.score = ScalarHead(*classifier.get_submodule("score").parameters())
        self.classifier = classifier

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, d) → (…)."""
        return self.classifier.get_submodule("score")(hidden).squeeze(-1)

    def hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """What the head reads: (b, t), (b, t) or None as in `model_mask`, (b, t) → (b, t, d)."""
        body = cast("PreTrainedModel", self.classifier.base_model)
        output = body(
            input_ids=input_ids,
            attention_mask=model_mask(attention_mask, body.dtype),
            position_ids=position_ids,
            use_cache=False,
        )
        return output.last_hidden_state


class TokenScores(Scores):
    """The classifier read at every token: a critic."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Scores (b, t), float32 or wider, of inputs as in `hidden`; those of padding hold no meaning."""
        return self.head(self.hidden(input_ids, attention_mask, position_ids))


class SequenceScores(Scores):
    """The classifier read at the last token of each sequence: a reward model."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        end_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Scores at the last tokens of n sequences. Returns (n,), float32 or wider.

        Args:
            end_mask: (b, t), True there, for scores row after row; or the numbers of the sequences, from 1 on, else 0.
        """
        scores = self.head(self.hidden(input_ids, attention_mask, position_ids)[end_mask > 0])
        return scores if end_mask.dtype == torch.bool else scores[end_mask[end_mask > 0].argsort()]


class HeadOnBody(nn.Module):
    """A scalar head on the body of a model whose class has none, with the parts of a classifier that `Scores` reads.

    Args:
        body: a transformers model that returns hidden states.
    """

    def __init__(self, body: "PreTrainedModel", weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.config = body.config
        self.base_model = body
        own = [nn.Parameter(tensor.to(body.device, body.dtype)) for tensor in (weight, bias) if tensor is not None]
        self.score = ScalarHead(*own)

    @property
    def dtype(self) -> torch.dtype:
        """Of the body."""
        return self.base_model.dtype


class ClassifierScores(nn.Module):
    """A classifier of transformers read by its own forward pass, which decides what of a sequence it looks at.

    Args:
        classifier: any `AutoModelForSequenceClassification`.
        label: the output whose logit is the score.
    """

    def __init__(self, classifier: "PreTrainedModel", label: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.label = label

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        _position_ids: torch.Tensor,
        end_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Scores of the rows (b, t) that have a True place in `end_mask`. Returns (n,), float32 or wider.

        The rows are padded on the right, with the id by which the classifier knows padding.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        logits = self.classifier(input_ids=input_ids, attention_mask=mask).logits
        return at_least_float32(logits[end_mask.any(dim=1), self.label])
