"""The coefficient with which the policy's entropy is held up in its loss."""

from typing import Any

from stages.lib.settings.entropy_bonus import AdaptiveEntropyBonus, EntropyBonus, FixedEntropyBonus


class EntropyCoefficient:
    """What the mean entropy of a token is multiplied by in the loss of a phase; part of a checkpoint.

    An adaptive one is c where the entropy e of the phase's rollouts is at most the target, else 0, and afterwards

        c <- c + step where e < target, max(c - step, 0) where e > target     (arXiv 2505.22312)
    """

    def __init__(self, settings: EntropyBonus) -> None:
        self.settings = settings
        self.coef = settings.coef if isinstance(settings, FixedEntropyBonus | AdaptiveEntropyBonus) else 0.0

    def of_phase(self, entropy: float) -> float:
        """The coefficient for rollouts of this entropy, in nats per token."""
        settings = self.settings
        return 0.0 if isinstance(settings, AdaptiveEntropyBonus) and entropy > settings.target else self.coef

    def update(self, entropy: float) -> None:
        """Move after a phase with rollouts of this entropy, in nats per token."""
        settings = self.settings
        if not isinstance(settings, AdaptiveEntropyBonus) or entropy == settings.target:
            return
        self.coef = max(self.coef + (settings.step if entropy < settings.target else -settings.step), 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = state["coef"]
