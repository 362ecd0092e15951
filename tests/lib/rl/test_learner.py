"""Updates of one engine: which rows, whose gradient, how many tokens they are divided by, and where a schedule ends."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.lib.command.errors import StageError
from stages.lib.compute.engine.torch import TorchEngine
from stages.lib.compute.processes import Processes
from stages.lib.models.scalar_scores import TokenScores
from stages.lib.rl.learner import Learner, Pass, TokenSums, mean_of_each, minibatches
from stages.lib.rl.rollouts import Rollouts, values_before
from stages.lib.settings.optimizer import OptimizerSettings
from tests.lib.rl.test_rollouts import PROMPTS, RESPONSES, read
from tests.tiny_models import CPU, batching, tiny_classifier

OPTIMIZER = OptimizerSettings(
    moments="float32",
    learning_rate=0.1,
    schedule="linear",
    warmup_ratio=0.0,
    min_learning_rate_ratio=0.1,
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    max_grad_norm=1e9,
    ema_decay=None,
)
PLAIN_TORCH = SimpleNamespace(activation_offload=False)


def engine(steps: int = 4) -> TorchEngine:
    return TorchEngine(TokenScores(tiny_classifier()), OPTIMIZER, steps, PLAIN_TORCH, Processes(0, 1, CPU))


def squared_values(rollouts: Rollouts, one: Pass) -> TokenSums:
    mask = rollouts.response_mask[one.rows]
    values = one.batch.on_completions(values_before(one.engine, one.batch), mask.shape[1])
    return {"loss": values.square().sum(), "tokens": mask.sum().to(values.dtype)}


def expected(rows: list[int]) -> torch.Tensor:
    """The mean of V² over the response tokens of these rows, each sequence read alone."""
    critic = tiny_classifier()
    total, count = 0.0, 0
    for row in rows:
        prompt, response = PROMPTS[row], RESPONSES[row]
        for t in range(len(response)):
            total = total + critic(torch.tensor([prompt + response[:t]])).logits.square().sum()
            count += 1
    (total / count).backward()
    gradient = torch.cat([weight.grad.flatten() for weight in critic.parameters()])
    return (total / count).item(), gradient


@pytest.mark.parametrize("budget", [4, 1000])
def test_an_update_is_on_the_mean_over_all_tokens_of_a_minibatch(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    own = engine()
    gradients: list[torch.Tensor] = []
    apply = own._apply
    monkeypatch.setattr(
        own,
        "_apply",
        lambda: gradients.append(torch.cat([w.grad.flatten() for w in own.module.classifier.parameters()])) or apply(),
    )
    learner = Learner("value", own, batching(budget), read(1000, packing=False), squared_values)
    loss, gradient = expected([2, 1])
    means = learner.update([2, 1])
    assert means["value/loss"] == pytest.approx(loss, rel=1e-5)
    assert means["value/tokens"] == 1  # their sum by their number
    assert torch.allclose(gradients[0], gradient, atol=1e-5)
    assert means["value/grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert own.steps_taken == 1


def test_measuring_changes_nothing() -> None:
    own = engine()
    before = [weight.clone() for weight in own.module.parameters()]
    learner = Learner("value", own, batching(1000), read(1000, packing=False), squared_values)
    assert learner.measure([2, 1])["value/loss"] == pytest.approx(expected([2, 1])[0], rel=1e-5)
    assert own.steps_taken == 0
    assert all(weight.grad is None for weight in own.module.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, own.module.parameters(), strict=True))


def test_a_broken_loss_takes_no_step() -> None:
    own = engine()

    def broken(rollouts: Rollouts, one: Pass) -> TokenSums:
        return {"loss": squared_values(rollouts, one)["loss"] * math.nan}

    with pytest.raises(StageError, match="value loss is nan at optimizer step 1: training has diverged"):
        Learner("value", own, batching(1000), read(1000, packing=False), broken).update([0])
    assert own.steps_taken == 0


def test_a_schedule_ends_after_the_updates_that_are_left() -> None:
    """4 were planned; a phase of two was cut short after one, so the second phase's last step is the third one."""
    own = engine(steps=4)
    assert own.learning_rate == 0.1
    own.steps_taken = 1
    own.expect(2)
    rates = []
    for _ in range(2):
        rates.append(own.learning_rate)
        own.steps_taken += 1
    # Linear over 3 steps from 0.1 to a tenth of it at the last.
    assert rates == pytest.approx([0.055, 0.01])


def test_every_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    settings = SimpleNamespace(epochs=2, minibatch_size=3)
    found = list(minibatches(6, settings, seed=5, phase=2))
    assert [len(rows) for rows in found] == [3, 3, 3, 3]
    first, second = found[0] + found[1], found[2] + found[3]
    assert sorted(first) == sorted(second) == list(range(6))
    assert first == np.random.Generator(np.random.Philox(key=[5, 2 << 32])).permutation(6).tolist()
    assert second == np.random.Generator(np.random.Philox(key=[5, (2 << 32) + 1])).permutation(6).tolist()


def test_means_are_over_the_updates_that_have_a_number() -> None:
    assert mean_of_each([{"a": 1.0}, {"a": 2.0, "b": 5.0}]) == {"a": 1.5, "b": 5.0}
    assert mean_of_each([]) == {}


def test_what_goes_beside_is_in_the_gradient_of_the_same_step() -> None:
    """Twice the loss of another row, as a mixture would add it: as if it had been in the loss of the first."""
    rollouts = read(1000, packing=False)

    def beside(own: TorchEngine) -> dict[str, torch.Tensor]:
        (batch,) = batching(1000).sequences([PROMPTS[0]], [RESPONSES[0]])
        loss = squared_values(rollouts, Pass(own, batch, [0]))["loss"] / len(RESPONSES[0])
        own.backward(2 * loss)
        return {"other/loss": loss.detach()}

    norms = {}
    for name, added in (("mixed", beside), ("alone", None)):
        found = Learner("value", engine(), batching(1000), rollouts, squared_values, added).update([2, 1])
        norms[name] = found.pop("value/grad_norm")
        assert found.pop("other/loss", None) == (pytest.approx(expected([0])[0], rel=1e-5) if added else None)
        assert found["value/loss"] == pytest.approx(expected([2, 1])[0], rel=1e-5)
    wanted = expected([2, 1])[1] + 2 * expected([0])[1]
    assert norms["mixed"] == pytest.approx(float(wanted.norm()), rel=1e-4)
    assert norms["alone"] != pytest.approx(norms["mixed"], rel=0.05)
    measured = Learner("value", engine(), batching(1000), rollouts, squared_values, beside).measure([2, 1])
    assert "other/loss" not in measured
