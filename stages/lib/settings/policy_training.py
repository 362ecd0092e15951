"""What the sections share whose policy is trained on its own responses."""

from typing import Annotated, Literal, Self

from annotated_types import Ge, Le
from pydantic import model_validator

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Count, Positive, Precision, SaveDtype, Text
from stages.lib.settings.declaration import block, key
from stages.lib.settings.held_out import HeldOutSettings, held_out
from stages.lib.settings.kl_penalty import (
    KlInReward,
    KlPenalty,
    kl_needs_reference,
    refuse_short_horizon,
    refuse_unread_reference,
)
from stages.lib.settings.rewards import MixedRewards
from stages.lib.settings.sampling import SamplingSettings
from stages.lib.settings.save_every import SaveEvery, save_every
from stages.lib.settings.truncated import MissingEos, Truncated


class PolicyTraining(SamplingSettings, MixedRewards):
    """Phases of responses and updates; what a section has otherwise, it declares again."""

    model: Text = key("models/sft", "folder of the language model that training starts from")
    reference: Text = key("models/sft", "folder of the language model that the KL is measured to")
    seed: Seed | None = key(None, "of prompts, sampling and order; null: the common seed")
    iterations: Count = key(10, "rollout phases")
    rollout_batch_size: Count = key(128, "of a rollout phase, over all processes", unit="prompts")
    samples_per_prompt: Annotated[int, Ge(1), Le(2**16)] = key(1, "to each prompt", unit="responses")
    epochs: Count = key(2, "passes over the rollouts of a phase; the later ones are on tokens of an earlier policy")
    minibatch_size: Count = key(
        64,
        "in an optimizer step, over all processes; rollout_batch_size times samples_per_prompt is a multiple of it",
        unit="rollouts",
    )
    kl: KlPenalty = key(block(KlInReward), "where the KL to the reference acts")
    score_clip: Positive | None = key(None, "scores are held within ± this; null: no clipping", unit="of the reward")
    truncated: Truncated = key(
        block(MissingEos), "what becomes of the score of a response that does not end within max_new_tokens"
    )
    held_out: HeldOutSettings | None = held_out()
    precision: Precision = key("fp32", "of weights and activations; the masters are float32 either way")
    save_dtype: SaveDtype = key("float32", "of the saved weights")
    save_every: SaveEvery | None = save_every()

    @model_validator(mode="after")
    def _check_phases(self) -> Self:
        if self.responses_per_iteration % self.minibatch_size:
            raise ValueError(
                f"rollout_batch_size ({self.rollout_batch_size}) times samples_per_prompt ({self.samples_per_prompt}) "
                f"must be a multiple of minibatch_size ({self.minibatch_size})"
            )
        refuse_unread_reference(self.kl, self.model, self.reference)
        refuse_short_horizon(self.kl, self.responses_per_iteration)
        if self.held_out is not None and self.held_out.kl_weight and not self.reads_reference:
            raise ValueError("held_out.kl_weight weighs a KL to a reference, and kl has none; set 0.0")
        return self

    @property
    def reads_reference(self) -> bool:
        """Whether a reference model is loaded."""
        return kl_needs_reference(self.kl)

    @property
    def reported_kl(self) -> Literal["k1", "k2", "k3"]:
        """The estimator of the KL that is reported, limited and steered: that in the reward, or k1."""
        return self.kl.estimator if isinstance(self.kl, KlInReward) else "k1"

    @property
    def responses_per_iteration(self) -> int:
        return self.rollout_batch_size * self.samples_per_prompt

    @property
    def updates_per_iteration(self) -> int:
        return self.epochs * (self.responses_per_iteration // self.minibatch_size)

    @property
    def total_updates(self) -> int:
        """At most: a phase may have fewer, or none."""
        return self.iterations * self.updates_per_iteration
