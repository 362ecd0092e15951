"""A policy whose body also carries a value head: one pass gives the log-probs of tokens, and values before them."""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from stages.lib.models.scalar_scores import ScalarHead
from stages.lib.models.token_logprobs import TokenLogProbs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TokenValues(NamedTuple):
    """As `TokenStatistics`, with the value of the state before each masked token, float32 or wider. Shapes: (b, t)."""

    logps: torch.Tensor
    entropies: torch.Tensor
    values: torch.Tensor


class PolicyWithValues(TokenLogProbs):
    """`log_probs` also gives values, of the hidden states that the tokens are drawn from.

    Args:
        language_model, chunk_tokens, entropy_gradient: as of `TokenLogProbs`.
        seed: of the new head, N(0, 1/(d+1)²), as that of a classifier (arXiv 2403.17031).
    """

    def __init__(
        self, language_model: "PreTrainedModel", *, chunk_tokens: int, entropy_gradient: bool, seed: int
    ) -> None:
        entropies = {"with_entropies": True, "entropy_gradient": entropy_gradient}
        super().__init__(language_model, chunk_tokens=chunk_tokens, **entropies)
        width = cast("nn.Linear", self._head()).in_features
        drawn = torch.empty((1, width)).normal_(std=1 / (width + 1), generator=torch.Generator().manual_seed(seed))
        self.value_head = ScalarHead(nn.Parameter(drawn.to(language_model.device, language_model.dtype)))
        self.body_learns_values = True

    def log_probs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        target_mask: torch.Tensor,
        temperature: float = 1.0,
    ) -> Any:
        """`TokenValues`, with gradient of the values in the head alone where `body_learns_values` is not set."""
        inputs = (input_ids, attention_mask, position_ids, target_mask, temperature)
        return TokenValues(*self._of_targets(self._with_values, *inputs))

    def _with_values(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(n, d), (n,) → (n,), three times: the fields of `TokenValues`."""
        states = hidden if self.body_learns_values else hidden.detach()
        return (*self._logps_and_entropies(hidden, targets, temperature), self.value_head(states).squeeze(-1))
