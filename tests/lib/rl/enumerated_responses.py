"""All responses of a small vocabulary, so that an expectation over any sampler is a sum, and a gradient has no noise.

A policy is a table in float64: logits of the next token after each history of tokens. The first token, 0, is EOS.
"""

from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rollouts import Rollouts

TOKENS, LENGTH = 4, 5  # with EOS; of the longest response


class Responses(NamedTuple):
    """Every response, (n, LENGTH) each: the place of the history before a token in the table, the token, the mask."""

    histories: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor


@cache
def responses() -> Responses:
    ids = [[*open_, 0] for length in range(LENGTH) for open_ in product(range(1, TOKENS), repeat=length)]
    ids += [[*open_] for open_ in product(range(1, TOKENS), repeat=LENGTH)]
    places = {history: place for place, history in enumerate(sorted({tuple(one[:t]) for one in ids for t in range(9)}))}
    width = range(LENGTH)
    histories = [[places[tuple(one[:t])] if t < len(one) else 0 for t in width] for one in ids]
    tokens = [[one[t] if t < len(one) else 0 for t in width] for one in ids]
    mask = [[t < len(one) for t in width] for one in ids]
    return Responses(torch.tensor(histories), torch.tensor(tokens), torch.tensor(mask))


def table(seed: int, scale: float = 1.0) -> torch.Tensor:
    """Logits, (histories, TOKENS)."""
    size = int(responses().histories.max()) + 1
    return scale * torch.randn(size, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_logps(logits: torch.Tensor) -> torch.Tensor:
    """Of every token of every response, (n, LENGTH), 0 beyond the ends."""
    every = responses()
    return torch.where(every.mask, logits.log_softmax(dim=1)[every.histories, every.tokens], 0.0)


def rewards(seed: int = 7) -> torch.Tensor:
    """(n,)."""
    return torch.rand(len(responses().mask), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def true_gradient(logits: torch.Tensor) -> torch.Tensor:
    """Of the expected reward in the table of a policy, as it is defined."""
    moving = logits.clone().requires_grad_()
    expected = (token_logps(moving).sum(dim=1).exp() * rewards()).sum()
    return torch.autograd.grad(expected, moving)[0]


def rollouts_of(policy: torch.Tensor, engine: torch.Tensor) -> Rollouts:
    """Each response once, with what trainer and engine say of it; the reference is a table of its own."""
    mask, scores = responses().mask, rewards()
    ids = [row[own].tolist() for row, own in zip(responses().tokens, mask, strict=True)]
    episodes = [Episode(Prompt(0, [1], [], {}), one, "", one[-1] == 0, 0, None, [True] * len(one)) for one in ids]
    zeros, reference = torch.zeros(mask.shape, dtype=torch.float64), token_logps(table(11))
    rewarded = scores[:, None] * mask
    found = Rollouts(episodes, scores, rewarded, mask, token_logps(policy), reference, zeros, zeros)
    return found._replace(engine_logps=token_logps(engine))


def chances(engine: torch.Tensor) -> torch.Tensor:
    """Of each response to be sampled, (n, 1): a sum over all, so weighted, is the mean over an engine's samples."""
    return token_logps(engine).sum(dim=1, keepdim=True).exp()


def advantages(engine: torch.Tensor) -> torch.Tensor:
    """Of each response's tokens, less the mean over an engine's samples, (n, LENGTH)."""
    return (rewards()[:, None] - (chances(engine) * rewards()[:, None]).sum()) * responses().mask


class TableEngine:
    """The policy as a loss reads it."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits.clone().requires_grad_()

    def __call__(self, *_: object) -> SimpleNamespace:
        return SimpleNamespace(logps=token_logps(self.logits), entropies=None)


def one_pass(engine: TableEngine) -> Any:
    """Over all responses, as a `Learner` gives it to a loss."""
    batch = SimpleNamespace(inputs=(), completion_mask=None, on_completions=lambda values, _: values)
    return SimpleNamespace(engine=engine, batch=batch, rows=list(range(len(responses().mask))))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
