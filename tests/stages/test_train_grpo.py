"""train_grpo: its loss, what it logs, and that a run that was stopped or spread out ends as any other."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from stages.lib.compute.schedule import learning_rate
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.group_loss import step_loss
from stages.lib.rl.learner import Pass
from stages.lib.settings.advantages import Advantages, Gdpo, ReinforceBaseline
from stages.lib.settings.declaration import block
from stages.lib.settings.engine_correction import TokenTruncated
from stages.lib.settings.kl_controller import AdaptiveKl
from stages.lib.settings.kl_penalty import KlInLoss, KlInReward, NoKl
from stages.lib.settings.policy_loss import PolicyLoss
from stages.lib.settings.rewards import RepetitionReward
from stages.lib.settings.train_grpo import TrainGrpo
from stages.lib.settings.truncated import FixedScore, MissingEos
from stages.train_grpo import penalised_scores
from tests.lib.rl.test_rollouts import read
from tests.loaded_python import torchrun
from tests.stages.test_resume import cut_short, outs
from tests.stages.test_training import (
    curve,
    distance,
    kill_after_a_checkpoint,
    metrics,
    reached,
    weights,
)
from tests.stages.tiny_pipeline import call, change, change_entries, read_yaml, refusal, start, write_yaml
from tests.tables import rollout_rows
from tests.tiny_models import batching, tiny_llama

Copy = Callable[..., Path]


def rollouts_of(folder: Path) -> list[dict[str, Any]]:
    return rollout_rows(folder, "grpo")


def grpo_settings(**changed: Any) -> TrainGrpo:
    return TrainGrpo.model_validate(block(TrainGrpo, **changed))


def loss_at(rollouts: Any, advantages: torch.Tensor, kl_coef: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The sums of one pass of another policy, and the gradient of their loss."""
    module = TokenLogProbs(tiny_llama(5))
    settings = grpo_settings(kl=block(KlInLoss, estimator="k3"))
    (batch,) = batching(1000).sequences(rollouts.prompts, rollouts.responses)
    loss = step_loss(settings, kl_coef, rollouts, advantages, [0, 1, 2])
    sums = loss(rollouts, Pass(module, batch, batch.rows))
    sums["loss"].backward()
    return (
        {name: value.detach() for name, value in sums.items()},
        torch.cat([weight.grad.flatten() for weight in module.parameters()]),
    )


def test_the_loss_is_that_of_the_formula() -> None:
    """Worked out from each response alone, token by token."""
    rollouts = read(1000, packing=False)
    advantages = torch.where(rollouts.response_mask, torch.tensor([[2.0], [-1.0], [0.5]]), 0.0)
    sums, _ = loss_at(rollouts, advantages, kl_coef=0.3)
    policy = tiny_llama(5)
    loss, divergence = 0.0, 0.0
    for row, (prompt, response) in enumerate(zip(rollouts.prompts, rollouts.responses, strict=True)):
        with torch.no_grad():
            log_probs = torch.log_softmax(policy(torch.tensor([prompt + response])).logits[0], dim=-1)
        for t, token in enumerate(response):
            logp = log_probs[len(prompt) - 1 + t, token]
            ratio = (logp - rollouts.logps[row, t]).exp()
            advantage = advantages[row, t]
            loss -= float(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
            d = logp - rollouts.reference_logps[row, t]
            divergence += float((-d).exp() - 1 + d)
    assert divergence > 1
    assert float(sums["kl"]) == pytest.approx(divergence, rel=1e-4)
    assert float(sums["loss"]) == pytest.approx(loss + 0.3 * divergence, rel=1e-4)


def test_groups_without_variance_move_nothing_but_the_kl_does() -> None:
    rollouts = read(1000, packing=False)
    nothing = torch.zeros_like(rollouts.logps)
    assert loss_at(rollouts, nothing, kl_coef=0.0)[1].count_nonzero() == 0
    assert loss_at(rollouts, nothing, kl_coef=0.1)[1].count_nonzero() > 0


def test_scores_are_clipped_before_a_penalty_is_taken_off() -> None:
    """Of 0.5, 1.5 and 2.5, of which the last did not end."""
    rewards = penalised_scores(grpo_settings(score_clip=1.0), read(1000, packing=False))
    assert rewards.tolist() == [0.5, 1.0, -1.0]


def test_every_sample_is_published_and_samples_differ(tiny: Path) -> None:
    rollouts = rollouts_of(tiny)
    assert [rollout["iteration"] for rollout in rollouts] == [1] * 8 + [2] * 8 + [3] * 8
    assert [rollout["sample"] for rollout in rollouts] == [0, 1] * 12
    pairs = list(zip(rollouts[::2], rollouts[1::2], strict=True))
    assert all(first["row"] == second["row"] for first, second in pairs)
    assert all(first["response_ids"] != second["response_ids"] for first, second in pairs)


def test_the_curve_is_that_of_the_rollouts(tiny: Path) -> None:
    rows = curve(tiny, "train_grpo")
    assert rows["objective/kl"][0] == 0
    assert rows["policy/kl"][2] > 0
    penalty = 2.0
    for iteration in range(3):
        own = rollouts_of(tiny)[8 * iteration : 8 * iteration + 8]
        scores = [rollout["score"] for rollout in own]
        rewards = [rollout["score"] - penalty * (not rollout["ended"]) for rollout in own]
        assert rows["objective/scores"][iteration] == pytest.approx(sum(scores) / 8, abs=1e-5)
        assert rows["objective/rewards"][iteration] == pytest.approx(sum(rewards) / 8, abs=1e-5)
        assert rows["group/distinct"][iteration] == 1
        assert rows["group/without_variance"][iteration] == 0
    results = metrics(tiny, "train_grpo")
    assert results["rollouts"] == 24
    assert (results["first_distinct_share"], results["last_without_variance_share"]) == (1, 0)
    assert results["last_score_mean"] == pytest.approx(sum(scores) / 8, abs=1e-6)


def test_the_first_minibatch_of_a_phase_is_on_policy(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_grpo": {"grpo": {"epochs": 1, "minibatch_size": 8}}})
    call(folder, "train_grpo")
    rows = curve(folder, "train_grpo")
    assert rows["policy/clipfrac"].tolist() == [0, 0, 0]
    assert rows["policy/approxkl"].abs().max() < 1e-9
    assert abs(rows["policy/kl"][0]) < 1e-9
    assert rows["policy/grad_norm"].min() > 0


def test_log_probs_of_sampling_stand_for_those_of_a_pass(copy_of_tiny: Copy, tiny: Path) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_grpo": {"grpo": {"reuse_sampler_logps": True}}})
    call(folder, "train_grpo")
    rows, wanted = curve(folder, "train_grpo"), curve(tiny, "train_grpo")
    assert rows["policy/first_ratio"].tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    for name in ("objective/scores", "objective/entropy", "policy/entropy", "policy/loss"):
        assert rows[name].tolist() == pytest.approx(wanted[name].tolist(), rel=1e-3, abs=1e-5)


def test_a_sampler_that_agrees_is_weighted_with_1(copy_of_tiny: Copy, tiny: Path) -> None:
    """Of float32 both sides differ by rounding; their log-probs stand side by side in the table of rollouts."""
    folder, chosen = copy_of_tiny(), block(TokenTruncated)
    change(folder / "params.yaml", {"train_grpo": {"grpo": {"engine_correction": chosen}}})
    call(folder, "train_grpo")
    rows = curve(folder, "train_grpo")
    assert (rows["engine/logp_difference_max"] < 1e-4).all()
    assert (rows["engine/logp_difference"] > 0).all()
    assert rows["engine/weight"].tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert rows["engine/bounded"].tolist() == [0, 0, 0]
    assert rows["policy/loss"].tolist() == pytest.approx(curve(tiny, "train_grpo")["policy/loss"].tolist(), abs=1e-5)
    for rollout in rollouts_of(folder):
        assert len(rollout["logps"]) == len(rollout["engine_logps"]) == rollout["length"]
        assert rollout["logps"] == pytest.approx(rollout["engine_logps"], abs=1e-4)
    assert "logps" not in rollouts_of(tiny)[0]


def test_greedy_like_sampling_gives_groups_that_teach_nothing(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture
) -> None:
    """All of a prompt's responses are alike: no reward moves the policy, and it starts where the KL pulls it."""
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_grpo": {"grpo": {"temperature": 0.001, "iterations": 1, "epochs": 1}}})
    call(folder, "train_grpo")
    row = curve(folder, "train_grpo").iloc[0]
    assert row["group/distinct"] == 0.5
    assert row["group/without_variance"] == 1
    assert row["policy/grad_norm"] < 1e-6
    results = metrics(folder, "train_grpo")
    assert (results["last_distinct_share"], results["last_without_variance_share"]) == (0.5, 1)
    said = capsys.readouterr().out
    assert "train_grpo@grpo: phase 1: Groups have no variance: 1 (group/without_variance above 0.5)" in said
    assert "train_grpo@grpo: phase 1: Replies in a group repeat: 0.5 (group/distinct at most 0.5)" in said


def test_a_run_that_was_cut_short_ends_as_if_it_had_not_been(
    copy_of_tiny: Copy, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_of_tiny()
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    cut_short(folder, "train_grpo", monkeypatch, after=2)
    capsys.readouterr()
    call(folder, "train_grpo")
    assert "resuming from step 2" in capsys.readouterr().out
    assert outs(folder, "train_grpo") == outs(tiny, "train_grpo")


def test_dynamic_sampling_goes_on_behind_the_prompts_that_a_killed_run_had_asked(
    copy_of_tiny: Copy, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About half of the groups are left out: those whose mean reward is not above that of the others."""
    rewards = [rollout["score"] - 2.0 * (not rollout["ended"]) for rollout in rollouts_of(tiny)]
    means = sorted((one + other) / 2 for one, other in zip(rewards[::2], rewards[1::2], strict=True))
    filtering = {"refill_rounds": 1, "above": round(means[len(means) // 2], 4), "below": None}
    whole, folder = copy_of_tiny("whole"), copy_of_tiny()
    for project in (whole, folder):
        # Its own learning rate ends with the steps that there are; the KL's coefficient has a state of its own, too.
        kl = block(KlInLoss, controller=block(AdaptiveKl, target=0.1, horizon=20.0))
        change(project / "params.yaml", {"train_grpo": {"grpo": {"dynamic_sampling": filtering, "kl": kl}}})
        change(project / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    coefs: list[float] = []
    monkeypatch.setattr(
        "stages.train_grpo.step_loss", lambda of, coef, *others: (coefs.append(coef), step_loss(of, coef, *others))[1]
    )
    call(whole, "train_grpo")
    steered = dict.fromkeys(coefs)
    cut_short(folder, "train_grpo", monkeypatch, after=2)
    call(folder, "train_grpo")
    assert outs(folder, "train_grpo") == outs(whole, "train_grpo")
    rows, results = curve(whole, "train_grpo"), metrics(whole, "train_grpo")
    kept, asked = rows["dynamic_sampling/kept"], rows["dynamic_sampling/prompts"]
    assert (results["prompts_asked"], results["prompts_left_out"]) == (asked.sum(), asked.sum() - kept.sum())
    assert 0 < kept.sum() < asked.sum()
    assert (asked > 4).any()
    assert (rows["policy/updates"] > 0).tolist() == (kept > 0).tolist()
    assert rows["objective/rewards"].mean() > rows["dynamic_sampling/unfiltered_rewards"].mean()
    assert rows["objective/kl_coef"].nunique() > 1
    trained = rows["policy/updates"] > 0
    assert rows["objective/kl_coef"][trained].tolist() == pytest.approx([*steered], rel=1e-6)
    # The schedule counts the steps that this phase takes, and those that are planned for the later ones.
    entry = TrainGrpo.model_validate(read_yaml(whole / "params.yaml")["train_grpo"]["grpo"])
    own, each, taken = entry.optimizer, entry.updates_per_iteration, 0
    schedule = (own.learning_rate, own.warmup_ratio, own.min_learning_rate_ratio, own.schedule)
    for phase, updates in enumerate(map(int, rows["policy/updates"])):
        total = taken + max(1, updates + (len(rows) - 1 - phase) * each)
        assert rows["learning_rate"][phase] == pytest.approx(learning_rate(taken, total, *schedule), rel=1e-6)
        taken += updates
    assert rows["policy/updates"].iloc[-1] < each


MODELS = (*get_args(get_args(PolicyLoss)[0]), *get_args(get_args(Advantages)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_loss_and_every_way_to_advantages_moves_the_policy(copy_of_tiny: Copy, model: type) -> None:
    """On its second update, too, where ratios are no longer 1."""
    folder, section = copy_of_tiny(), "loss" if model in MODELS[:10] else "advantages"
    # GDPO standardises each reward, and so takes no score that stands for all of them.
    truncated = block(MissingEos, penalty=0.0) if model is Gdpo else block(FixedScore, score=0.0)
    chosen = {"iterations": 1, "truncated": truncated, section: block(model)}
    # A number from 0 to 1, of which all of these advantages can be made.
    rewards = {"repeats": block(RepetitionReward, n=1, weight=-1.0)}
    chosen |= {"rewards": rewards, "reward_model": "models/sft", "top_entropy_share": 0.5}
    params = read_yaml(folder / "params.yaml")
    params["train_grpo"]["grpo"] |= chosen
    write_yaml(folder / "params.yaml", params)
    call(folder, "train_grpo")
    row = curve(folder, "train_grpo").iloc[0]
    assert row["policy/updates"] == 4
    assert row["policy/grad_norm"] > 0
    assert distance(weights(folder, "sft"), weights(folder, "grpo")) > 0


def test_another_micro_batch_size_gives_the_same_policy(copy_of_tiny: Copy, tiny: Path) -> None:
    folder = copy_of_tiny()
    change(folder / "runtime.yaml", {"default": {"micro_batch_tokens": 1, "generation_batch_size": 3}})
    call(folder, "train_grpo")
    assert distance(weights(tiny, "grpo"), weights(folder, "grpo")) < 1e-5


@pytest.mark.slow
def test_two_processes_make_what_one_makes(copy_of_tiny: Copy) -> None:
    """Stopped on the way, and finished by one, with all weights sharded in between.

    Whitening, a baseline and a quantile are each over all rollouts, whichever process has read them.
    """
    over_a_phase = {"advantages": block(ReinforceBaseline), "top_entropy_share": 0.5}
    knobs = {"zero_stage": 3, "frozen_zero_stage": 3}
    alone, folder = copy_of_tiny("alone"), copy_of_tiny()
    for project in (alone, folder):
        change(project / "params.yaml", {"train_grpo": {"grpo": {"iterations": 12} | over_a_phase}})
    call(alone, "train_grpo")
    change(folder / "runtime.yaml", {"default": knobs | {"checkpoint_seconds": 0.0}})
    assert kill_after_a_checkpoint(folder, "train_grpo", signal.SIGTERM, torchrun()) == 1
    last = reached(folder)
    assert last < 12
    process = start(folder, "train_grpo")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"resuming from step {last}" in output
    assert distance(weights(alone, "grpo"), weights(folder, "grpo")) < 1e-5
    ours, theirs = rollouts_of(folder), rollouts_of(alone)
    assert [rollout["response_ids"] for rollout in ours] == [rollout["response_ids"] for rollout in theirs]
    assert metrics(folder, "train_grpo") == pytest.approx(metrics(alone, "train_grpo"), rel=1e-4, abs=1e-5)


def test_a_policy_with_adapters_is_measured_against_its_base(copy_of_tiny: Copy, tiny: Path) -> None:
    folder = copy_of_tiny()
    lora = {
        "rank": 2,
        "alpha": 4,
        "targets": "all-linear",
        "experts": False,
        "routers": False,
        "rslora": False,
        "base_quantization": None,
    }
    change(folder / "params.yaml", {"train_grpo": {"grpo": {"lora": lora | {"save_adapter": True}}}})
    call(folder, "train_grpo")
    rows = curve(folder, "train_grpo")
    assert rows["objective/kl"][0] == rows["policy/kl"][0] * 0
    assert rows["objective/kl"][2] != 0
    first = [[rollout["response_ids"] for rollout in rollouts_of(one)[:8]] for one in (folder, tiny)]
    assert first[0] == first[1]
    assert (folder / "models/grpo/adapter/adapter_model.safetensors").is_file()


def test_a_prompt_that_leaves_no_room_is_refused(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_grpo": {"grpo": {"max_new_tokens": 5000}}})
    message = refusal(folder, "train_grpo", capsys)
    assert "data/tokens/train/prompts.arrow with train_grpo.grpo.max_new_tokens: the longest prompt has" in message


def test_a_reward_model_that_breaks_is_one_line(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of_tiny()
    file = folder / "models/rm/model.safetensors"
    tensors = load_file(file)
    tensors["score.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    before = outs(folder, "train_grpo")
    assert "the reward reward_model fails: it gives nan" in refusal(folder, "train_grpo", capsys)
    assert outs(folder, "train_grpo") == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"samples_per_prompt": 1},
            "advantages of type group_relative compare a prompt's samples: samples_per_prompt must be at least 2",
        ),
        (
            {"minibatch_size": 3},
            "rollout_batch_size (4) times samples_per_prompt (2) must be a multiple of minibatch_size (3)",
        ),
        ({"advantages": {"type": "group_relative", "scale": "std", "epsilon": 1e-4}}, "did you mean 'group_std'"),
        ({"advantages": {"type": "gdpo", "epsilon": 1e-4}, "kl": block(KlInReward)}, "kl.type must not be in_reward"),
        ({"advantages": block(Gdpo), "score_clip": 1.0}, "advantages of type gdpo standardise each: set null"),
        ({"advantages": block(Gdpo), "truncated": block(FixedScore)}, "truncated of type fixed_score changes the sum"),
        ({"kl": block(NoKl)}, "held_out.kl_weight weighs a KL to a reference, and kl has none; set 0.0"),
    ],
)
def test_a_wrong_setting_is_named(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, values: dict[str, Any], message: str
) -> None:
    folder = copy_of_tiny()
    change_entries(folder, {"train_grpo": values})
    assert message in refusal(folder, "train_grpo", capsys)
