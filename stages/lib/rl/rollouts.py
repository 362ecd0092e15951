"""Rollouts: the episodes of a phase, and what policy, reference, critic and reward say of them, as aligned tensors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from stages.lib.command.errors import StageError
from stages.lib.compute.batching import MicroBatching, SequenceBatch
from stages.lib.models.policy_with_values import PolicyWithValues
from stages.lib.rl.episodes import Episode
from stages.lib.rl.kl_control import kl_estimate
from stages.lib.rl.token_rewards import token_rewards


class Rollouts(NamedTuple):
    """b episodes, the same in all processes; per-token tensors are aligned to response tokens, 0 beyond their end."""

    episodes: list[Episode]
    scores: torch.Tensor  # (b,), of the reward
    rewards: torch.Tensor  # (b, t), of each token: the score at the last one, until something else is made of it
    response_mask: torch.Tensor  # (b, t), True on response tokens
    logps: torch.Tensor  # (b, t), under the policy that sampled, at the sampling temperature
    reference_logps: torch.Tensor | None  # (b, t), under the reference, at the same temperature; None without one
    entropies: torch.Tensor  # (b, t)
    values: torch.Tensor  # (b, t), of the critic before each token; 0 without one
    # (b,), what each reward of a mixture said, by name; NaN where it does not apply, or failed
    parts: dict[str, torch.Tensor] = {}  # noqa: RUF012 (never changed)
    failures: Mapping[str, Mapping[str, int]] = {}
    engine_logps: torch.Tensor | None = None  # (b, t), as the sampler has them, where these are kept beside `logps`
    engine_weights: torch.Tensor | None = None  # (b, t), of the tokens' losses; None: all 1
    staleness: int | None = None  # updates of the policy since the weights that sampled, where that is not always 0

    @property
    def prompts(self) -> list[list[int]]:
        return [episode.prompt.ids for episode in self.episodes]

    @property
    def responses(self) -> list[list[int]]:
        return [episode.ids for episode in self.episodes]

    def groups(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the episodes, (b,), with the samples of a prompt in one row, (prompts, samples)."""
        return values.reshape(-1, self.group_size)

    @property
    def group_size(self) -> int:
        """Samples of a prompt."""
        return 1 + max(episode.sample for episode in self.episodes)

    def weighted(self, losses: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Losses of the tokens of some rows, (n, t), each times its weight."""
        return losses if self.engine_weights is None else losses * self.engine_weights[rows]

    @property
    def ended(self) -> torch.Tensor:
        """(b,), True where the response ends with EOS."""
        return torch.tensor([episode.ended for episode in self.episodes], device=self.logps.device)

    def kl(self, kind: Literal["k1", "k2", "k3"]) -> torch.Tensor | None:
        """An estimate of the KL to the reference at each token, in nats, (b, t); None without a reference."""
        if self.reference_logps is None:
            return None
        return torch.where(self.response_mask, kl_estimate(self.logps, self.reference_logps, kind), 0.0)


def summary(rollouts: Rollouts, kl: torch.Tensor | None) -> dict[str, float]:
    """Means over the responses, but for the entropy of a token; KL and "objective/entropy" are summed over a response.

    Args:
        kl: at each token, (b, t); None: there is no reference.
    """
    mask, entropies = rollouts.response_mask, rollouts.entropies
    return {
        "objective/scores": float(rollouts.scores.mean()),
        **({} if kl is None else {"objective/kl": float(kl.sum(dim=-1).mean())}),
        "objective/entropy": float(entropies.sum(dim=-1).mean()),
        "response/length": float(mask.sum(dim=-1).float().mean()),
        "response/eos_rate": float(rollouts.ended.float().mean()),
        "policy/entropy": float(entropies.sum() / mask.sum()),
    }


@torch.no_grad()
def read_rollouts(
    episodes: list[Episode],
    scores: Sequence[float],
    policy: Callable,
    reference: Callable | None,
    critic: Callable | None,
    temperature: float,
    batching: MicroBatching,
) -> Rollouts:
    """Forward passes of policy, reference and critic over all responses, shared out over the processes.

    Where the sampler kept log-probs and entropies, these stand for those of the policy; log-probs alone stand beside.

    Args:
        policy: a `TokenLogProbs` module, or what stands for it; the values are those of its head, if it has one, where
            there is no critic.
        reference: another one, or None.
        critic: a `TokenScores` module, or None.
    """
    prompts, responses = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]
    lengths = torch.tensor([len(ids) for ids in responses], device=batching.processes.device)
    width = int(lengths.max())

    kept = all(episode.engine_entropies is not None for episode in episodes)
    of_policy = critic is None and isinstance(getattr(policy, "module", policy), PolicyWithValues)

    def passes() -> torch.Tensor:
        found = torch.zeros((4, len(episodes), width), device=lengths.device)
        for batch in batching.sequences(prompts, responses) if not kept or reference or critic or of_policy else []:
            inputs, readings = (*batch.inputs, batch.completion_mask, temperature), dict[int, torch.Tensor]()
            if not kept or of_policy:
                read = policy(*inputs)
                readings = {} if kept else {0: read.logps, 2: read.entropies}
                readings |= {3: read.values} if of_policy else {}
            if reference:
                readings[1] = reference(*inputs)[0]
            if critic:
                readings[3] = values_before(critic, batch)
            for place, reading in readings.items():
                found[place, batch.rows] = batch.on_completions(reading, width).to(found.dtype)
        return found

    found = batching.budget.attempt(passes)
    batching.processes.sum_tensor(found)  # each row is 0 in all processes but one
    if kept:
        for row, episode in enumerate(episodes):
            own = torch.tensor([episode.engine_logps, episode.engine_entropies], device=lengths.device)
            found[[0, 2], row, : len(episode.ids)] = own
    scored = torch.tensor(scores, device=lengths.device)
    mask = torch.arange(width, device=lengths.device) < lengths[:, None]
    rewards = token_rewards(None, scored, mask, kl_coef=0.0)
    logps, reference_logps, entropies, values = found
    require_finite_logps(episodes, mask, {"policy": logps, "reference": reference_logps})
    rollouts = Rollouts(
        episodes, scored, rewards, mask, logps, reference_logps if reference else None, entropies, values
    )
    return rollouts if kept else rollouts._replace(engine_logps=engine_logps_of(episodes, logps))


def engine_logps_of(episodes: Sequence[Episode], like: torch.Tensor) -> torch.Tensor | None:
    """The log-probs that a sampler gave with all of the episodes, 0 beyond their ends; else None. Shapes: (b, t)."""
    found = torch.zeros_like(like)
    for row, episode in enumerate(episodes):
        if episode.engine_logps is None:
            return None
        found[row, : len(episode.ids)] = found.new_tensor(episode.engine_logps)
    return found


def require_finite_logps(episodes: list[Episode], mask: torch.Tensor, found: Mapping[str, torch.Tensor]) -> None:
    """Raise StageError for a token of a response that a model gives no finite log-prob.

    Args:
        mask: True on response tokens, (b, t).
        found: of each model by its name, (b, t).
    """
    for model, logps in found.items():
        for row, place in torch.nonzero(mask & ~logps.isfinite())[:1].tolist():
            episode = episodes[row]
            raise StageError(
                f"row {episode.prompt.row} of the prompts, response {episode.text[:60]!r}: the {model} gives its token "
                f"{episode.ids[place]} the log-prob {float(logps[row, place])}: it bars that token, or its weights are "
                "broken"
            )


def values_before(critic: Callable, batch: SequenceBatch) -> torch.Tensor:
    """V of the state before each token: the critic read one position earlier. (b, t); the first column is 0."""
    scores = critic(*batch.inputs)
    return torch.cat([torch.zeros_like(scores[:, :1]), scores[:, :-1]], dim=1)
