"""Model FLOPs: the floating-point operations that a step's mathematics asks for, whatever a program spends on it.

Model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, Appendix B) is model FLOPs per second over the GPU's peak. A
forward pass that is run again (gradient checkpointing, the recomputed chunks of logits) and padding do not count: they
make a step slower, and so lower the MFU.

A multiplication by a weight takes 2 FLOPs a weight and token in the forward pass, and 2 each in the backward pass for
the gradient of its input and that of the weight: 6 N a token for all the weights N of the body's linear layers.
Attention takes 12 L h t a token of a sequence of t tokens, in L layers with heads of h dimensions in all: two products
(Q Kᵀ, and the probabilities by V), both of activations, 2 h t FLOPs each, times three for the backward pass. As in
PaLM, the half of them that a causal mask makes superfluous is counted. What differs here from that formula:

- The LM head counts at completion tokens alone, where log-probs are needed: 6 h V a completion token, not 6 h V a token
  as it would with the head's weights in N. A look-up of embeddings takes none.
- With LoRA (arXiv 2106.09685) the frozen weights get no gradient of their own, so they take 4 N a token and the head
  4 h V, while the adapters, of rank (in + out) weights each, take 6. The lowest layer's are over-counted: none of the
  gradients of its input is needed.
- Norms, biases, rotations, softmax, scalar heads and the optimizer are left out, as usual.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Dense bf16 matrix FLOPs per second by NVIDIA's data sheets, which for Hopper and Ada give twice that, with sparsity.
# The first entry whose words are all in the GPU's name counts.
PEAKS = (
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)


def peak_flops(gpu: str) -> float | None:
    """Peak dense bf16 FLOPs per second of a GPU by the name that torch gives it; None for one not in the table."""
    words = gpu.replace("-", " ").split()
    return next((peak for name, peak in PEAKS if set(name.split()) <= set(words)), None)


@dataclass(frozen=True)
class Architecture:
    """A Llama-like decoder: grouped-query attention, a gated feed-forward part of three matrices, one LM head."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int

    @property
    def _linear_layers(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer of one block."""
        keys = self.hidden // self.heads * self.key_value_heads
        attention = [(self.hidden, self.hidden), (self.hidden, keys), (self.hidden, keys), (self.hidden, self.hidden)]
        wide = (self.hidden, self.intermediate)
        return [*attention, wide, wide, wide[::-1]]

    @property
    def body_weights(self) -> int:
        """N: weights of the linear layers of the body, without embeddings and head."""
        return self.layers * sum(inner * outer for inner, outer in self._linear_layers)

    def adapter_weights(self, rank: int) -> int:
        """Weights of low-rank adapters on all of them; 0 for rank 0."""
        return self.layers * rank * sum(inner + outer for inner, outer in self._linear_layers)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary


def training_flops(architecture: Architecture, lengths: Sequence[int], logit_tokens: int, rank: int = 0) -> int:
    """Of a forward and a backward pass.

    Args:
        lengths: tokens of each sequence, padding not counted.
        logit_tokens: tokens whose log-probs are needed; 0 for a model with a scalar head.
        rank: of adapters on a frozen base; 0 where every weight is trained.
    """
    frozen_or_trained = 4 if rank else 6
    per_token = frozen_or_trained * architecture.body_weights + 6 * architecture.adapter_weights(rank)
    head = frozen_or_trained * architecture.head_weights * logit_tokens
    return per_token * sum(lengths) + 3 * attention_flops(architecture, lengths) + head


def forward_flops(architecture: Architecture, lengths: Sequence[int], logit_tokens: int, rank: int = 0) -> int:
    """Of a forward pass. Sampling token by token takes as many, with the convention on the causal mask.

    Args: as `training_flops`.
    """
    per_token = 2 * (architecture.body_weights + architecture.adapter_weights(rank))
    head = 2 * architecture.head_weights * logit_tokens
    return per_token * sum(lengths) + attention_flops(architecture, lengths) + head


def attention_flops(architecture: Architecture, lengths: Sequence[int]) -> int:
    """Of the products of activations with activations in a forward pass: 4 L h t²  for a sequence of t tokens."""
    return 4 * architecture.layers * architecture.hidden * sum(length * length for length in lengths)
