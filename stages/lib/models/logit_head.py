"""The head of a language model in half precision, with its products in float32.

A head in bfloat16 would round its logits to 8 bits, half a unit in the last place of a logit of 20 being 0.06 nats.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LogitHead(nn.Linear):
    """A linear head with weights in half precision that returns float32.

    The weights are exact in float32, and so are their products with hidden states in half precision; it is the sums
    that are not rounded back. The products of the backward pass stay in half precision, as without this head: rounding
    moves a gradient by a share of itself, where it moved a log-prob by a share of its logit.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, d) → (…, vocabulary)."""
        logits: Any = ProductInFloat32.apply(input.flatten(0, -2), self.weight)
        logits = logits.unflatten(0, input.shape[:-1])
        return logits if self.bias is None else logits + self.bias.float()


class ProductInFloat32(torch.autograd.Function):
    """x Wᵀ of matrices in half precision, (n, d) and (vocabulary, d), in float32."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        if input.is_cuda:
            return torch.mm(input, weight.t(), out_dtype=torch.float32)
        return input.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        input, weight = ctx.saved_tensors
        gradient = gradients[0].to(input.dtype)
        of_input = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = gradient.t() @ input if ctx.needs_input_grad[1] else None
        return of_input, of_weight


def widen_logits(language_model: "PreTrainedModel") -> None:
    """Let a language model in half precision return float32 logits, in whatever pass; another stays as it is."""
    head = language_model.get_output_embeddings()
    if type(head) is nn.Linear and head.weight.dtype in (torch.bfloat16, torch.float16):
        language_model.set_output_embeddings(LogitHead(head))
