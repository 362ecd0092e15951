"""Scalar scores of sequences and of their tokens: the reward model and the critic."""

import torch
from torch import nn
from torch.nn import functional

from stages.lib.token_logprobs import position_ids


class TokenScores(nn.Module):
    """A transformers sequence classifier with one output, read at any token. The head runs in float32.

    Args:
        classifier: `AutoModelForSequenceClassification` with `num_labels=1` and a bias-free head named `score`.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Scores at every token. (b, t), (b, t) → (b, t), float32; positions of padding hold no meaning."""
        hidden = self._hidden(input_ids, attention_mask)
        return functional.linear(hidden.float(), self.classifier.score.weight.float()).squeeze(-1)

    def _hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.classifier.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask.long(),
            position_ids=position_ids(attention_mask),
            use_cache=False,
        )
        return output.last_hidden_state


class SequenceScores(TokenScores):
    """The same classifier, read at the last real token of each sequence: a reward model."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Score at the last True of `attention_mask` (right or left padded). (b, t), (b, t) → (b,), float32."""
        hidden = self._hidden(input_ids, attention_mask)
        width = attention_mask.shape[1]
        last = (attention_mask * torch.arange(width, device=attention_mask.device)).argmax(dim=-1)
        at_end = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        return functional.linear(at_end.float(), self.classifier.score.weight.float()).squeeze(-1)
