"""Held-out evaluation of a policy while it trains: its answers to validation prompts, and which weights are best."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from stages.lib.command.errors import StageError
from stages.lib.compute.engine.base import require_finite
from stages.lib.data.prompts import Prompt, prompts_of
from stages.lib.objectives.best_weights import BestWeights, Patience, cost_of
from stages.lib.rl.collector import Collector
from stages.lib.rl.prompt_table import read_prompts, require_fit
from stages.lib.rl.rewards.entry_rewards import part_names
from stages.lib.rl.rewards.reward_metrics import reward_metrics
from stages.lib.rl.rewards.scoring import RewardError
from stages.lib.rl.rollout_log import RolloutLog
from stages.lib.rl.rollouts import Rollouts, summary
from stages.lib.rl.samplers.sampler import SamplerError
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.settings.epochs import BestBy, require_compared_metric
from stages.lib.settings.held_out import HeldOutSettings
from stages.lib.settings.held_out_metrics import METRICS, held_out_metrics
from stages.lib.settings.rewards import MixedRewards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP = 2**31  # of the random numbers: later than any phase, and the same for all evaluations
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


def evaluated_metrics(settings: Evaluated, sources: Iterable[str]) -> list[str]:
    """What an evaluation on prompts of these sources finds."""
    parts = part_names(cast(MixedRewards, settings))
    return held_out_metrics(parts, sources, has_reference=settings.reads_reference)


def held_out_columns(settings: Evaluated, path: Path, where: str) -> tuple[str, ...]:
    """The columns of the curve.

    Args:
        path: of the prompts' token table.
        where: the entry of params.yaml, for messages.
    Raises:
        StageError: evaluations are compared by an unknown metric, or the table is of another tokenizer.
    """
    if settings.held_out is None:
        return ()
    table = read_prompts(path, Path(settings.model))
    metrics = evaluated_metrics(settings, table["source"][: settings.held_out.prompts])
    require_compared_metric(settings.held_out.best_by, metrics, f"{where}.held_out")
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
        max_kl: nats per response above which an evaluation's weights are not kept as the best; None: none.
    """

    def __init__(
        self,
        section: Evaluated,
        prompts: Sequence[Prompt],
        collector: Collector,
        rewards: Callable[[Rollouts], torch.Tensor],
        log: RolloutLog,
        max_kl: float | None = None,
    ) -> None:
        self.settings = settings = section.held_out
        self.metrics = evaluated_metrics(section, (prompt.source for prompt in prompts))
        self.prompts = prompts
        self.collector = collector._replace(critic=None, sampler=collector.sampler.undisturbed())
        self.rewards = rewards
        self.log = log
        self.max_kl = max_kl
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

    def after_phase(self, phase: int, *, is_last: bool, stands: int | None = None) -> dict[str, float]:
        """What the curve gets of an evaluation after a phase (0-based); {} if none is due.

        Args:
            stands: phases whose updates are in the weights that training has stepped back to; None: all are.
        Raises:
            RewardError: a response has no reward; nothing that a checkpoint holds has changed.
            SamplerError: an engine has failed that samples; the same.
        """
        if self.settings is None or not (is_last or (phase + 1) % self.settings.every == 0):
            return {}
        results = self._evaluate(phase, stands)
        self.patience.offer(cost_of(results, self.settings.best_by))
        return {f"validation/{name}": value for name, value in results.items()}

    def _evaluate(self, phase: int, stands: int | None) -> dict[str, float]:
        with self.policy.engine.averaged():
            rollouts = self._rollouts()
            results = self._found(rollouts, phase) if isinstance(rollouts, Rollouts) else {}
            if results and not self._is_passed_over(results, stepped_back=stands is not None):
                self.best.offer(results, phase + 1 if stands is None else stands, self._weights)
        if not isinstance(rollouts, Rollouts):
            raise rollouts
        self.log.append(phase, rollouts, rollouts.kl("k1"))
        return results

    def _rollouts(self) -> Rollouts | RewardError | SamplerError:
        """The responses, or why there are none: an error of all processes, which first go back to their weights."""
        try:
            return self.collector.collect(self.prompts, STEP)
        except (RewardError, SamplerError) as error:
            return error

    def _found(self, rollouts: Rollouts, phase: int) -> dict[str, float]:
        assert self.settings is not None
        kl, rewards = rollouts.kl("k1"), float(self.rewards(rollouts).mean())
        found = summary(rollouts, kl) | reward_metrics(rollouts) | {"objective/rewards": rewards}
        found["objective/rlhf_reward"] = rewards - self.settings.kl_weight * found.get("objective/kl", 0.0)
        results = {name: found[name] for name in self.metrics if name in found}
        for name, value in results.items():
            require_finite(value, f"validation {name}", phase)
        if self.settings.best_by.metric not in results:
            raise StageError(f"held_out.best_by.metric: no validation prompt has {self.settings.best_by.metric}")
        return results

    def _is_passed_over(self, results: Mapping[str, float], *, stepped_back: bool) -> bool:
        """Whether weights are too far from the reference to be the best: not those of the end, if others were, too."""
        if self.max_kl is None or self.best.keep == "last" or results["objective/kl"] <= self.max_kl:
            return False
        return not stepped_back or bool(self.best.results)

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
