"""Which settings of train_ppo cannot stand beside each other, and what its paths must name."""

from typing import Any

import pytest

from stages.lib.command.errors import StageError
from stages.lib.settings.agreement import require_agreement
from stages.lib.settings.declaration import block
from stages.lib.settings.held_out import HeldOutSettings
from stages.lib.settings.kl_controller import AdaptiveKl, FixedKl
from stages.lib.settings.kl_penalty import KlInLoss, KlInReward, NoKl
from stages.lib.settings.named_models import require_kinds
from tests.lib.settings.test_agreement import params, runtimes

NO_KL = {"kl": block(NoKl), "held_out": block(HeldOutSettings, kl_weight=0.0)}
RESET = {"reference_reset": {"every": 1}}
PTX = {"ptx": {"coef": 1.0, "batch_size": 8}, "ptx_tokens": "data/tokens/train/sft.arrow"}
LORA = {"rank": 4, "alpha": 8, "targets": "all-linear", "experts": False, "routers": False, "rslora": False}
LORA |= {"base_quantization": None, "save_adapter": False}
ADAPTIVE = {"kl": block(KlInReward, controller=block(AdaptiveKl, horizon=50.0))}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (NO_KL | {"reference": "models/base"}, "reference: with kl.type none and a coefficient of 0 nothing reads it"),
        (NO_KL | {"max_kl": 1.0}, "max_kl limits the KL to a reference, and kl has none; set null"),
        (
            {"max_kl": 1.0, "asynchronous": True, "reuse_sampler_logps": True},
            "max_kl steps back by the KL of a phase's responses, and with asynchronous: true these are of weights",
        ),
        (NO_KL | RESET, "reference_reset: kl has no reference; set null"),
        (RESET | {"reference": "models/base"}, "reference_reset: the reference becomes the policy"),
        (RESET | {"lora": LORA}, "reference_reset moves whole models, and lora trains adapters"),
        (RESET | {"held_out": block(HeldOutSettings, keep="best")}, "compares KLs to several references"),
        (
            ADAPTIVE | {"samples_per_prompt": 2},
            "must be more than a fifth of rollout_batch_size times samples_per_prompt (256)",
        ),
        ({"kl": block(KlInLoss) | {"estimator": "k1"}}, "k1 in the loss has a gradient of mean 0"),
        ({"kl": block(NoKl) | {"coef": 0.1}}, "train_ppo.ppo.kl.coef is not a known key"),
        (PTX | {"ptx": None}, "ptx_tokens: with ptx: null nothing reads data/tokens/train/sft.arrow"),
        (PTX | {"ptx_tokens": "data/tokens"}, "ptx_tokens: expected <folder of tokens>/train/sft.arrow"),
        ({"samples_per_prompt": 3, "minibatch_size": 256}, "rollout_batch_size (128) times samples_per_prompt (3)"),
    ],
)
def test_what_cannot_stand_together_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError) as caught:
        params(train_ppo=changed)
    assert message in str(caught.value)


@pytest.mark.parametrize("limit", ["max_kl", "max_policy_kl"])
def test_steps_are_taken_back_in_float32_alone(limit: str) -> None:
    entry = params()["train_ppo"]["ppo"].model_dump()
    optimizer = entry["policy_optimizer"] | {"moments": "8bit"}
    with pytest.raises(StageError, match=f"{limit} takes steps back, which needs policy_optimizer"):
        params(train_ppo={limit: 0.1, "policy_optimizer": optimizer})


@pytest.mark.parametrize(
    "kl",
    [
        block(NoKl),
        block(KlInLoss, controller=block(FixedKl, coef=0.0)),
        block(KlInReward, controller=block(FixedKl, coef=0.0)),
    ],
)
def test_no_coefficient_no_reference(kl: dict[str, Any]) -> None:
    settings = params(train_ppo=NO_KL | {"kl": kl})
    assert not settings["train_ppo"]["ppo"].reads_reference
    assert params()["train_ppo"]["ppo"].reads_reference
    require_agreement(settings, runtimes())


@pytest.mark.parametrize(
    ("changed", "how", "message"),
    [
        (
            {"train_ppo": PTX | {"ptx_tokens": "data/nowhere/train/sft.arrow"}},
            {},
            "train_ppo.ppo.ptx_tokens: data/nowhere is neither there nor made by a stage",
        ),
        (
            {"train_ppo": RESET},
            {"train_ppo": {"frozen_zero_stage": 3}},
            "frozen_zero_stage: 3 shards the reference, which reference_reset fills; use 0",
        ),
    ],
)
def test_sections_that_do_not_agree_are_refused(changed: dict, how: dict, message: str) -> None:
    with pytest.raises(StageError) as caught:
        require_agreement(params(**changed), runtimes(**how))
    assert message in str(caught.value)


def test_ptx_needs_rows_of_kind_sft() -> None:
    settings = params(train_ppo=PTX, prepare_data={"kinds": ["preference", "prompts"]}) | {"train_sft": {}}
    with pytest.raises(StageError, match=r"train_ppo\.ppo\.ptx needs rows of kind sft"):
        require_kinds(settings)
