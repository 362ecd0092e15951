"""Scalar scores of sequences and of their tokens: the reward model and the critic."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from stages.lib.models.token_logprobs import at_least_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ScalarHead(nn.Linear):
    """A bias-free head with one output that computes in float32 or wider, whatever the dtype of its weights."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight.shape[1], 1, bias=False, device="meta")
        self.weight = weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, d) → (…, 1)."""
        return functional.linear(at_least_float32(input), at_least_float32(self.weight))


class Scores(nn.Module):
    """A transformers sequence classifier with one output.

    Args:
        classifier: `AutoModelForSequenceClassification` with `num_labels=1` and a bias-free head named `score`, which
            is replaced by a `ScalarHead` on the same weights.
    """

    classifier: "PreTrainedModel"

    def __init__(self, classifier: "PreTrainedModel") -> None:
        super().__init__()
        (weight,) = classifier.get_submodule("score").parameters()
        classifier.score = ScalarHead(weight)
        self.classifier = classifier

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, d) → (…)."""
        return self.classifier.get_submodule("score")(hidden).squeeze(-1)

    def hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """What the head reads: (b, t), (b, t) or None where there is no padding, (b, t) → (b, t, d)."""
        output = self.classifier.base_model(
            input_ids=input_ids,
            attention_mask=None if attention_mask is None else attention_mask.long(),
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
        """Scores at the True places of `end_mask` (b, t), row after row. Returns (n,), float32 or wider."""
        hidden = self.hidden(input_ids, attention_mask, position_ids)
        return self.head(hidden[end_mask])
