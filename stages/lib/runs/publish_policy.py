"""What an RL stage publishes: its policy, the adapter if asked for, and the log of its rollouts."""

from collections.abc import Mapping
from pathlib import Path

from stages.lib.rl.rollout_log import RolloutLog
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.runs.training_run import TrainingRun


def publish_policy(
    this_run: TrainingRun,
    policy: TrainedPolicy,
    log: RolloutLog,
    results: Mapping[str, float],
    *,
    save_dtype: str,
    tokenizer_from: Path,
) -> None:
    """Publish "model", "metrics", "curve" and "rollouts": the averaged weights where the optimizer keeps an average."""
    engine, lora = policy.engine, policy.lora
    with engine.averaged():
        weights = engine.master_weights(policy.language_model)

        def build_others(staged: dict[str, Path]) -> None:
            staged["rollouts"].mkdir()
            if log.path is not None:
                (staged["rollouts"] / "rollouts.jsonl").write_bytes(log.path.read_bytes())
            lora.save_adapter(weights, staged["model"], save_dtype)

        this_run.publish_model(
            policy.language_model,
            this_run.processes.in_main(lambda: lora.merged(weights)),
            {**results, **lora.counts()},
            save_dtype=save_dtype,
            tokenizer_from=tokenizer_from,
            build_others=build_others,
        )
