"""A bandit: one prompt, three replies of one token each, and a table of logits in float64 for a policy.

With reward r, start π₀ and coefficient β of the KL, where a policy must end is known:

    max E[r] − β KL(π ‖ π₀)     π = π₀ e^(r/β) / Z         k1 in the reward, or k2 in the loss
    max E[r] − β KL(π₀ ‖ π)     π = β π₀ / (λ − r)         k3 in the loss: its gradient is that of the other KL

A group's mean contains the sample itself, so that GRPO sees (G − 1)/G of the reward: with the KL in the loss it ends
where β G/(G − 1) does. In the reward the KL shrinks with it. `enumerated` finds each optimum without either formula.

Several seeds are learned side by side, a row of the table each, and share nothing but the calls of the functions.
"""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import torch

from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rollouts import Rollouts

REWARDS = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
START = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
BETA = 0.5
SEEDS = range(5)
BATCH = 256  # samples of a phase and seed, in two minibatches

Optimum = Callable[[float], torch.Tensor]  # of the coefficient of the KL


def of_reverse_kl(beta: float) -> torch.Tensor:
    """Where KL(π ‖ π₀) is in balance with the reward."""
    return torch.softmax(START.log() + REWARDS / beta, dim=0)


def of_forward_kl(beta: float) -> torch.Tensor:
    """Where KL(π₀ ‖ π) is: λ by bisection, above the largest reward, so that the shares sum to 1."""
    low, high = 1.0 + beta * 1e-6, 1.0 + beta
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (beta * START / (middle - REWARDS)).sum() > 1 else (low, middle)
    return beta * START / (low - REWARDS)


def enumerated(beta: float, *, forward: bool, points: int = 500) -> torch.Tensor:
    """The best of all policies whose shares are multiples of 1/points, none of them 0."""
    first, second = torch.meshgrid(torch.arange(1, points), torch.arange(1, points), indexing="ij")
    inside = first + second < points
    counts = torch.stack([first[inside], second[inside], points - first[inside] - second[inside]], dim=1)
    policies = counts.double() / points
    ratio = policies.log() - START.log()
    divergence = (-START * ratio if forward else policies * ratio).sum(dim=1)
    return policies[int((policies @ REWARDS - beta * divergence).argmax())]


class Engine:
    """The policy as a loss reads it: log-probs of the sampled arms, and entropies."""

    def __init__(self) -> None:
        self.logits = START.log().expand(len(SEEDS), 3).clone().requires_grad_()

    def __call__(self, rows: torch.Tensor, arms: torch.Tensor, *_: object) -> SimpleNamespace:
        """`rows` of the table and `arms`, each (b,)."""
        log_probs = self.logits.log_softmax(dim=1)[rows]
        entropies = -(log_probs.exp() * log_probs).sum(dim=1, keepdim=True)
        return SimpleNamespace(logps=log_probs.gather(1, arms[:, None]), entropies=entropies)

    @property
    def policies(self) -> torch.Tensor:
        """(seeds, arms)."""
        return self.logits.detach().softmax(dim=1)


class Phase(NamedTuple):
    """What was sampled: rollouts of all seeds, one seed behind the other, and the arms (seeds · BATCH,)."""

    rollouts: Rollouts
    rows: torch.Tensor
    arms: torch.Tensor

    def passes(self, engine: Engine, minibatches: int) -> list[SimpleNamespace]:
        """What a loss is given: as many samples of each seed in each minibatch."""
        seeds, per_seed = len(SEEDS), BATCH // minibatches
        places = (
            torch.arange(seeds * BATCH).reshape(seeds, minibatches, per_seed).transpose(0, 1).reshape(minibatches, -1)
        )
        return [self.one_pass(engine, found) for found in places]

    def one_pass(self, engine: Engine, places: torch.Tensor) -> SimpleNamespace:
        batch = SimpleNamespace(
            inputs=(self.rows[places], self.arms[places]),
            completion_mask=torch.ones(len(places), 1, dtype=torch.bool),
            on_completions=lambda values, _: values,
        )
        return SimpleNamespace(engine=engine, batch=batch, rows=places)


def sampled(engine: Engine, generators: list[torch.Generator], group_size: int) -> Phase:
    """BATCH samples of each seed, which stand in groups."""
    draws = zip(engine.policies, generators, strict=True)
    arms = torch.cat([torch.multinomial(shares, BATCH, replacement=True, generator=own) for shares, own in draws])
    rows = torch.arange(len(SEEDS)).repeat_interleave(BATCH)
    with torch.no_grad():
        logps, entropies = vars(engine(rows, arms)).values()
    scores, reference = REWARDS[arms], START.log()[arms][:, None]
    mask = torch.ones_like(logps, dtype=torch.bool)
    values = torch.zeros_like(logps)
    episodes = episodes_of(group_size)
    return Phase(Rollouts(episodes, scores, scores[:, None], mask, logps, reference, entropies, values), rows, arms)


@cache
def episodes_of(group_size: int) -> list[Episode]:
    """Who is in a group with whom; nothing else is read of them."""
    prompt = Prompt(0, [0], [], {})
    return [Episode(prompt, [0], "", True, place % group_size, None, [True]) for place in range(len(SEEDS) * BATCH)]


def seed_by_seed(rollouts: Rollouts) -> list[Rollouts]:
    """Those of each seed: what takes a mean over a phase takes it over one seed's."""
    parts = [slice(seed * BATCH, (seed + 1) * BATCH) for seed in range(len(SEEDS))]
    columns = {name: value for name, value in rollouts._asdict().items() if isinstance(value, torch.Tensor | list)}
    return [rollouts._replace(**{name: value[part] for name, value in columns.items()}) for part in parts]


def total_variation(policies: torch.Tensor, optimum: torch.Tensor) -> torch.Tensor:
    """(seeds,)."""
    return (policies - optimum).abs().sum(dim=1) / 2
