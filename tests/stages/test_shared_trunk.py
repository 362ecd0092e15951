"""train_ppo with a value head on the policy's body: what moves while it warms up, what is published, killed or not."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.lib.command.errors import StageError
from stages.lib.settings.critic import SharedTrunk
from stages.lib.settings.declaration import block
from stages.lib.settings.sections import build_all, default_params
from tests.stages.test_resume import cut_short, outs
from tests.stages.test_training import curve, weights
from tests.stages.tiny_pipeline import call, change, change_entries, lay_over

Copy = Callable[..., Path]
SHARED = {"critic": block(SharedTrunk, publish=True), "critic_warmup_iterations": 1}
OTHER = block(SharedTrunk, path="models/base")
SHARED |= {"policy_optimizer": {"ema_decay": 0.8}}


def test_a_value_head_warms_up_learns_and_is_published_killed_or_not(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = copy_of_tiny("whole"), copy_of_tiny("killed")
    for project in (whole, folder):
        change_entries(project, {"train_ppo": SHARED})
    call(whole, "train_ppo")
    rows = curve(whole, "train_ppo")
    assert rows["policy/updates"].tolist() == [0, 4, 4]
    assert rows["objective/kl"].tolist()[:2] == [0, 0]  # sampled before and after the head alone has learned
    assert rows["objective/kl"][2] != 0
    assert rows["value/loss"].gt(0).all()
    assert {"value/learning_rate", "value/grad_norm"}.isdisjoint(rows)
    # Without keep: best, the critic's body is the published policy's.
    policy, critic = weights(whole, "ppo"), load_file(whole / "models/ppo/critic/model.safetensors")
    body = {name: weight for name, weight in critic.items() if name.startswith("model.")}
    assert len(body) == len(critic) - 1
    assert all(torch.equal(weight, policy[name]) for name, weight in body.items())
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    cut_short(folder, "train_ppo", monkeypatch, after=2)
    call(folder, "train_ppo")
    assert outs(folder, "train_ppo") == outs(whole, "train_ppo")


def test_a_critic_is_a_start_for_another(copy_of_tiny: Copy) -> None:
    """With its average, where one is asked for."""
    folder = copy_of_tiny()
    change_entries(
        folder, {"train_ppo": {"iterations": 1, "critic": {"publish": True, "optimizer": {"ema_decay": 0.5}}}}
    )
    call(folder, "train_ppo")
    (folder / "models/ppo").rename(folder / "models/first")
    change_entries(folder, {"train_ppo": {"critic": {"path": "models/first/critic"}}})
    call(folder, "train_ppo")
    first, second = (load_file(folder / f"models/{name}/critic/model.safetensors") for name in ("first", "ppo"))
    assert first.keys() == second.keys()
    assert any(not torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"critic": block(SharedTrunk, path="models/base")},
            "critic.path: a shared trunk is that of model (models/sft",
        ),
        (SHARED | {"policy_optimizer": {"weight_decay": 0.1}}, "policy_optimizer.weight_decay would move the policy"),
        ({"critic": {"optimizer": {"ema_decay": 0.9}}}, "optimizer.ema_decay must be null, or publish true"),
    ],
)
def test_what_contradicts_itself_is_named(values: dict, message: str) -> None:
    params = default_params()
    lay_over(params["train_ppo"]["ppo"], values)
    with pytest.raises(StageError, match=re.escape(message)):
        build_all(params, "params.yaml")
