"""The stages that have a section of their name in runtime.yaml.

They stand here, where no manifest lists them, so that one more stage makes no other one stale.
"""

# The stages that launch.sh starts, each with a section of its own name.
STAGES = (
    "train_sft",
    "train_rm",
    "sample_pairs",
    "pass_rates",
    "ref_logprobs",
    "train_dpo",
    "ref_logprobs_unpaired",
    "train_unpaired",
    "train_ppo",
    "train_grpo",
    "evaluate",
    "score_samples",
    "evaluate_rm",
)
DATA_STAGES = ("tokenize_data",)  # they use `workers` alone
