"""Log-probabilities of chosen tokens under a causal language model, without whole-vocabulary logits in memory."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from stages.lib.models.attention_masks import model_mask
from stages.lib.models.logit_head import widen_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PassName = Literal["log_probs", "predictions", "details", "prompt_logits", "next_logits"]


class TokenStatistics(NamedTuple):
    """Of the tokens that a mask selects, in nats, float32 or wider; 0 at all others. Shapes: (b, t)."""

    logps: torch.Tensor
    entropies: torch.Tensor  # of the distributions that the tokens are drawn from


class TokenDetails(NamedTuple):
    """As `TokenStatistics`, with gradient in `logps` alone. Shapes: (b, t)."""

    logps: torch.Tensor
    entropies: torch.Tensor
    mean_logits: torch.Tensor  # over the vocabulary
    log_collisions: torch.Tensor  # log Σ_v π(v)²: of two draws, the log-probability that they are the same token


class TokenPredictions(NamedTuple):
    """As `TokenStatistics`, with gradient in `logps` alone. Shapes: (b, t)."""

    logps: torch.Tensor
    entropies: torch.Tensor
    hits: torch.Tensor  # 1 where no other token is likelier


class TokenLogProbs(nn.Module):
    """log π(y_t | x, y_<t) for the tokens that a mask selects: what an engine wraps instead of the language model.

    Hidden states are selected before the LM head, which computes in float32 (`LogitHead`), as the log-softmax does,
    over chunks of tokens that the backward pass recomputes, so no (b, t, vocabulary) tensor exists.

    There are five passes: `log_probs`, `predictions`, `details`, and for sampling `prompt_logits` and `next_logits`.
    All go through `forward`, which an engine calls and into which DeepSpeed hooks; it takes the pass by its name.

    Args:
        language_model: a transformers causal language model.
        chunk_tokens: tokens whose logits exist at a time.
        with_entropies: also measure the entropies, where no gradient is recorded (otherwise they are returned as 0).
        entropy_gradient: also where one is, so that a loss may hold them.
    """

    language_model: "PreTrainedModel"

    def __init__(
        self,
        language_model: "PreTrainedModel",
        *,
        chunk_tokens: int = 4096,
        with_entropies: bool = False,
        entropy_gradient: bool = False,
    ) -> None:
        super().__init__()
        widen_logits(language_model)
        self.language_model = language_model
        self.chunk_tokens = chunk_tokens
        self.with_entropies = with_entropies
        self.entropy_gradient = entropy_gradient
        self.softcap = getattr(language_model.config, "final_logit_softcapping", None)

    def forward(self, *inputs: Any, run: PassName = "log_probs") -> Any:
        """What the pass named `run` returns for these inputs."""
        return getattr(self, run)(*inputs)

    def log_probs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        target_mask: torch.Tensor,
        temperature: float = 1.0,
    ) -> TokenStatistics:
        """Log-probs of the masked tokens and the entropies of the distributions they were drawn from.

        Args:
            input_ids: (b, t) token ids.
            attention_mask: (b, t), True on real tokens, padding on either side; None where there is no padding; or the
                parts of rows, as `model_mask` takes them.
            position_ids: (b, t); several sequences may lie in one row, each counted from 0.
            target_mask: (b, t), True on tokens whose log-prob is wanted; never at a sequence's first token.
            temperature: above 0; logits are divided by it, as when sampling.
        """
        found = self._of_targets(
            self._logps_and_entropies, input_ids, attention_mask, position_ids, target_mask, temperature
        )
        return TokenStatistics(*found)

    def predictions(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        target_mask: torch.Tensor,
    ) -> TokenPredictions:
        """As `log_probs` at temperature 1, and what was foreseen, also where a gradient is recorded."""
        inputs = (input_ids, attention_mask, position_ids, target_mask)
        return TokenPredictions(*self._of_targets(self._logps_and_predictions, *inputs, 1.0))

    def details(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        target_mask: torch.Tensor,
    ) -> TokenDetails:
        """As `log_probs` at temperature 1, with more of each distribution, also where a gradient is recorded."""
        return TokenDetails(
            *self._of_targets(self._logps_and_details, input_ids, attention_mask, position_ids, target_mask, 1.0)
        )

    def _of_targets(
        self,
        of_chunk: "OfChunk",
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        target_mask: torch.Tensor,
        temperature: float,
    ) -> list[torch.Tensor]:
        """What `of_chunk` returns for the masked tokens, chunk by chunk; 0 at all others. Shapes: (b, t)."""
        output = self.language_model.base_model(
            input_ids=input_ids,
            attention_mask=model_mask(attention_mask, self.language_model.dtype),
            position_ids=position_ids,
            use_cache=False,
        )
        before_target = target_mask[:, 1:]
        hidden = output.last_hidden_state[:, :-1][before_target]
        targets = input_ids[:, 1:][before_target]
        count = self._chunks_of(hidden)
        recompute = torch.is_grad_enabled() and count > 1
        cuts = tuple(range(self.chunk_tokens, count * self.chunk_tokens, self.chunk_tokens))
        pieces = zip(hidden.tensor_split(cuts), targets.tensor_split(cuts), strict=True)
        chunks = [self._chunk(of_chunk, states, tokens, temperature, recompute) for states, tokens in pieces]
        columns = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
        empty = torch.zeros(input_ids.shape, dtype=columns[0].dtype, device=input_ids.device)
        return [empty.masked_scatter(target_mask, column) for column in columns]

    def prompt_logits(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, lengths: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """The logits after the last token of each prompt, for sampling. Returns (b, vocabulary).

        Args:
            input_ids: (b, t), padded on the right, which no token of a prompt sees.
            position_ids: (b, t).
            lengths: (b,), of the prompts.
            cache: an empty key-value cache of transformers, which this pass fills.
        """
        output = self.language_model.base_model(
            input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        rows = torch.arange(len(lengths), device=lengths.device)
        return self._logits(output.last_hidden_state[rows, lengths - 1], 1.0)

    def next_logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """The logits after the last token of each row, for sampling. Returns (b, vocabulary).

        Args:
            input_ids: (b, t), of what the cache does not hold yet.
            attention_mask: (b, cached + t), True on real tokens, padding on the left; None: the cache knows it.
            position_ids: (b, t).
            cache: a key-value cache of transformers, or what stands for one, to which this pass adds.
        """
        output = self.language_model(
            input_ids=input_ids,
            attention_mask=None if attention_mask is None else attention_mask.long(),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _chunks_of(self, hidden: torch.Tensor) -> int:
        """Into how many chunks to cut (n, d) hidden states, at least 1; the last ones may be empty.

        Under ZeRO 3 the processes gather the LM head for each chunk, together: all need as many as the one with most.
        """
        count = max(1, math.ceil(hidden.shape[0] / self.chunk_tokens))
        head = next(self._head().parameters())
        if not hasattr(head, "ds_id") or not dist.is_initialized():
            return count
        most = torch.tensor(count, device=hidden.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def _head(self) -> nn.Module:
        head = self.language_model.get_output_embeddings()
        assert head is not None, "a causal language model has a head"
        return head

    def _chunk(
        self, of_chunk: "OfChunk", hidden: torch.Tensor, targets: torch.Tensor, temperature: float, recompute: bool
    ) -> tuple[torch.Tensor, ...]:
        if recompute:
            return checkpoint(of_chunk, hidden, targets, temperature, use_reentrant=False)
        return of_chunk(hidden, targets, temperature)

    def _logps_and_entropies(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, d), (n,) → (n,), (n,)."""
        log_probs = torch.log_softmax(self._logits(hidden, temperature), dim=-1)
        logps = log_probs.gather(-1, targets[:, None]).squeeze(-1)
        if not self.with_entropies or (torch.is_grad_enabled() and not self.entropy_gradient):
            return logps, torch.zeros_like(logps)
        return logps, -(log_probs.exp() * log_probs).sum(dim=-1)

    def _logps_and_predictions(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(n, d), (n,) → (n,), three times: the fields of `TokenPredictions`."""
        log_probs = torch.log_softmax(self._logits(hidden, temperature), dim=-1)
        logps = log_probs.gather(-1, targets[:, None]).squeeze(-1)
        with torch.no_grad():
            entropies = -torch.linalg.vecdot(log_probs.exp(), log_probs)
            return logps, entropies, (logps >= log_probs.amax(dim=-1)).to(logps.dtype)

    def _logps_and_details(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(n, d), (n,) → (n,), four times: the fields of `TokenDetails`."""
        logits = self._logits(hidden, temperature)
        log_probs = torch.log_softmax(logits, dim=-1)
        logps = log_probs.gather(-1, targets[:, None]).squeeze(-1)
        with torch.no_grad():
            probs = log_probs.exp()
            entropies = -torch.linalg.vecdot(probs, log_probs)
            return logps, entropies, logits.mean(dim=-1), torch.linalg.vecdot(probs, probs).log()

    def _logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """(n, d) → (n, vocabulary), float32 or wider."""
        logits = at_least_float32(self._head()(hidden))
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / temperature if temperature != 1 else logits


# (hidden states, targets, temperature) → values of each target
OfChunk = Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, ...]]


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Half-precision values in float32; others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
