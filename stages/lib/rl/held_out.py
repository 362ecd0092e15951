"""Held-out evaluation of a policy while it trains: its answers to validation prompts, and which weights are best."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.compute.engine.base import require_finite
from stages.lib.data.prompts import Prompt, prompts_of
from stages.lib.objectives.best_weights import BestWeights, Patience, cost_of
from stages.lib.rl.collector import Collector
from stages.lib.rl.prompt_table import read_prompts, require_fit
from stages.lib.rl.rewards.entry_rewards import part_names
from stages.lib.rl.rewards.reward_metrics import reward_columns, reward_metrics
from stages.lib.rl.rollout_log import RolloutLog
from stages.lib.rl.rollouts import Rollouts, summary
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.settings.epochs import BestBy
from stages.lib.settings.held_out import HeldOutSettings
from stages.lib.settings.rewards import MixedRewards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP = 2**31  # of the random numbers: later than any phase, and the same for all evaluations
METRICS = (
    "objective/scores",
    "objective/rewards",
    "objective/rlhf_reward",
    "objective/kl",
    "response/length",
    "response/eos_rate",
    "policy/entropy",
)
NOTHING_TO_COMPARE = BestBy(metric=METRICS[0], better="higher")


class Evaluated(Protocol):
    """What is read here of a section of params.yaml, which is one of `MixedRewards`, too."""

    @property
    def held_out(self) -> HeldOutSettings | None: ...

    @property
    def model(self) -> str: ...

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def reads_reference(self) -> bool: ...


def held_out_metrics(settings: Evaluated) -> list[str]:
    """What an evaluation finds: `METRICS`, and where there are several rewards the mean of each, as of a verifier."""
    metrics = [metric for metric in METRICS if settings.reads_reference or metric != "objective/kl"]
    columns = reward_columns(part_names(cast(MixedRewards, settings)), ())
    return metrics + [column for column in columns if column.startswith("rewards/")]


def held_out_columns(settings: Evaluated, where: str) -> tuple[str, ...]:
    """The columns of the curve. Raises StageError, naming the entry `where`, for a metric that there is not."""
    if settings.held_out is None:
        return ()
    name, metrics = settings.held_out.best_by.metric, held_out_metrics(settings)
    if name not in metrics:
        raise StageError(
            f"params.yaml: {where}.held_out.best_by.metric: there is no metric {name!r} here"
            f"{nearest(name, metrics)}; there are {', '.join(metrics)}"
        )
    return tuple(f"validation/{metric}" for metric in metrics)


def held_out_prompts(settings: Evaluated, path: Path, model: "PreTrainedModel", where: str) -> list[Prompt]:
    """The validation prompts of an evaluation; none where none is asked for.

    Args:
        path: of the prompts' token table.
        model: loaded from the folder that the settings name.
        where: the entry of params.yaml, for messages.
    Raises:
        StageError: the table is of another tokenizer, or empty, or a prompt leaves no room for a response.
    """
    if settings.held_out is None:
        return []
    table = read_prompts(path, Path(settings.model))
    if not len(table):
        raise StageError(f"{path} holds no prompt to evaluate on; set {where}.held_out: null")
    require_fit(table, path, model, settings.max_new_tokens, where)
    return prompts_of(table[: settings.held_out.prompts])


class HeldOutEvaluation:
    """Evaluates the policy as it stands, on the same prompts with the same random numbers every time.

    Args:
        section: whose key `held_out` may be null: nothing is evaluated then, and the last weights are kept.
        prompts: of `held_out_prompts`.
        policy: what is trained; its average is evaluated where the optimizer keeps one.
        collector: what training makes rollouts with; no value of its critic is read.
        rewards: what responses are rewarded with, (b,), comparable between phases.
        log: of the responses.
    """

    def __init__(
        self,
        section: Evaluated,
        prompts: Sequence[Prompt],
        collector: Collector,
        rewards: Callable[[Rollouts], torch.Tensor],
        log: RolloutLog,
    ) -> None:
        self.settings = settings = section.held_out
        self.metrics = held_out_metrics(section)
        self.prompts = prompts
        self.collector = collector._replace(critic=None, sampler=collector.sampler.undisturbed())
        self.rewards = rewards
        self.log = log
        keep, best_by = (settings.keep, settings.best_by) if settings else ("last", NOTHING_TO_COMPARE)
        self.best = BestWeights(keep, best_by, is_main=self.policy.engine.processes.is_main)
        self.patience = Patience(settings.early_stopping if settings else None)

    @property
    def policy(self) -> TrainedPolicy:
        return self.collector.policy

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"best": self.best, "patience": self.patience}

    def after_phase(self, phase: int, *, is_last: bool) -> dict[str, float]:
        """What the curve gets of an evaluation after a phase (0-based); {} if none is due."""
        if self.settings is None or not (is_last or (phase + 1) % self.settings.every == 0):
            return {}
        results = self._evaluate(phase)
        self.patience.offer(cost_of(results, self.settings.best_by))
        return {f"validation/{name}": value for name, value in results.items()}

    def _evaluate(self, phase: int) -> dict[str, float]:
        assert self.settings is not None
        with self.policy.engine.averaged():
            rollouts = self.collector.collect(self.prompts, STEP)
            kl, rewards = rollouts.kl("k1"), float(self.rewards(rollouts).mean())
            found = summary(rollouts, kl) | reward_metrics(rollouts) | {"objective/rewards": rewards}
            found["objective/rlhf_reward"] = rewards - self.settings.kl_weight * found.get("objective/kl", 0.0)
            results = {name: found[name] for name in self.metrics if name in found}
            for name, value in results.items():
                require_finite(value, f"validation {name}", phase)
            if self.settings.best_by.metric not in results:
                raise StageError(f"held_out.best_by.metric: no validation prompt has {self.settings.best_by.metric}")
            self.best.offer(results, phase + 1, self._weights)
        self.log.append(phase, rollouts, kl)
        return results

    def _weights(self) -> dict[str, torch.Tensor]:
        return self.policy.lora.trained(self.policy.engine.master_weights(self.policy.language_model))

    def results(self) -> dict[str, float]:
        """Metrics of the weights that are published, by `validation_<name>`, and the phase (1-based) they are from."""
        if self.settings is None:
            return {}
        short = {name: name.rpartition("/")[2] for name in METRICS}
        own = self.best.results.items()
        found = {f"validation_{short.get(name, name.replace('/', '_'))}": value for name, value in own}
        return {**found, "kept_iteration": self.best.step}
