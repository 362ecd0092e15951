"""What foresees the returns of PPO: a model of its own, or a head on the policy's body, each with the keys it has."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.lib.settings.bounds import Positive, Text
from stages.lib.settings.declaration import Settings, block, key
from stages.lib.settings.optimizer import OptimizerSettings


class SeparateCritic(Settings):
    """A model of its own, with an optimizer of its own."""

    type: Literal["separate"] = key("separate", "a model of its own")
    path: Text = key(
        "models/rm",
        "folder that it starts from: a reward model, or a language model such as the policy's start (with a new head)",
    )
    publish: bool = key(False, "also write it to models/<name>/critic, a reward model's folder")
    optimizer: OptimizerSettings = key(
        block(OptimizerSettings, learning_rate=5e-4, schedule="linear", warmup_ratio=0.02, epsilon=1e-5),
        "of the critic, which is to learn soon: a longer warm-up would cost what critic_warmup_iterations gains; "
        "ema_decay needs publish: true, since an average is for publishing alone",
    )

    @model_validator(mode="after")
    def _check_average(self) -> "SeparateCritic":
        if self.optimizer.ema_decay is not None and not self.publish:
            raise ValueError("optimizer.ema_decay must be null, or publish true: the critic is not published")
        return self


class SharedTrunk(Settings):
    """A value head on the policy's body; the policy's optimizer trains both, on the sum of their losses."""

    type: Literal["shared_trunk"] = key(
        "shared_trunk", "a new value head on the policy's own body", source="arXiv 1707.06347, Eq 9"
    )
    path: Text = key("models/sft", "the entry's own model, whose body it is")
    coef: Positive = key(0.1, "of the value loss beside the policy's", source="arXiv 2403.17031")
    publish: bool = key(False, "also write body and value head to models/<name>/critic, a reward model's folder")


Critic = Annotated[SeparateCritic | SharedTrunk, Field(discriminator="type")]
