from stages.lib.report.outcome import outcome

REWARD_MODEL = {"accuracy": 0.78, "accuracy_ci_low": 0.74, "accuracy_ci_high": 0.82}
SFT = {"prompts": 400, "eos_rate": 0.99, "gold_mean": 1.0, "reward_mean": 1.0}


def evaluation(gold=None, reward=(0.5, 0.4, 0.6), kl=12.344, eos_rate=0.99):
    """An evaluation with a difference from SFT and its interval, by gold utility (if there is one) and by reward."""
    metrics = {"prompts": 400, "kl_to_reference_mean": kl, "eos_rate": eos_rate, "reward_mean": 1.0}
    for measure, difference in (("gold", gold), ("reward", reward)):
        if difference:
            names = ("minus_reference_mean", "minus_reference_ci_low", "minus_reference_ci_high")
            metrics |= {f"{measure}_{name}": value for name, value in zip(names, difference, strict=True)}
            names = ("win_rate_vs_reference", "win_rate_vs_reference_ci_low", "win_rate_vs_reference_ci_high")
            metrics |= {f"{measure}_{name}": value for name, value in zip(names, (0.7, 0.65, 0.75), strict=True)}
            metrics[f"{measure}_mean"] = 1.0
    return metrics


def sentences(policies, reward_model=REWARD_MODEL, **known):
    said = outcome(policies, "SFT", {"rm": reward_model} if reward_model else {}, known)
    return [sentence.replace("\N{NO-BREAK SPACE}", " ") for sentence in said]


def test_gains_by_the_gold_utility():
    said = sentences({"sft": SFT, "dpo": evaluation((0.425, 0.3, 0.55))}, bayes_accuracy=0.803)
    assert said == [
        "On 400 test prompts, DPO beats SFT in mean gold utility (+0.42, 95 % interval +0.30 to +0.55; better on "
        "70.0 % of the prompts, 65.0 % to 75.0 %).",
        "The reward model rm agrees with 78.0 % of the test preferences (95 % interval 74.0 % to 82.0 %), 2.3 points "
        "below the Bayes accuracy of 80.3 %, the most that any model can expect.",
        "The KL from SFT, in nats per response, is 12.34 for DPO; the share of responses that end by themselves, with "
        "EOS, is 99.0 % for SFT and 99.0 % for DPO.",
    ]


def test_an_interval_that_includes_zero_is_no_gain():
    said, *_ = sentences({"ppo": evaluation((0.05, -0.1, 0.2), reward=(0.1, -0.1, 0.3))})
    assert (
        "PPO cannot be told from SFT in mean gold utility (+0.05, 95 % interval −0.10 to +0.20, which includes zero"
        in said
    )
    assert "beats" not in said
    assert "although" not in said


def test_an_interval_that_touches_zero_is_no_gain():
    said, *_ = sentences({"ppo": evaluation((0.1, 0.0, 0.2))})
    assert "cannot be told from SFT" in said


def test_a_loss_is_called_one():
    said, *_ = sentences({"ppo": evaluation((-0.3, -0.4, -0.2), reward=(-0.1, -0.2, -0.05))})
    assert "PPO falls below SFT in mean gold utility (−0.30, 95 % interval −0.40 to −0.20;" in said


def test_a_gain_that_only_the_reward_model_sees_is_told():
    said, *_ = sentences({"ppo": evaluation((-0.3, -0.4, -0.2), reward=(1.2, 1.0, 1.4))})
    assert said.endswith("although the reward model puts it above SFT (+1.20, 95 % interval +1.00 to +1.40).")


def test_without_gold_the_reward_is_named_as_an_opinion():
    said, *_ = sentences({"sft": SFT, "dpo": evaluation(), "ppo": evaluation(reward=(0.2, -0.1, 0.5))})
    assert "DPO beats SFT in mean reward (+0.50," in said
    assert "; PPO cannot be told from SFT in mean reward (+0.20," in said
    assert said.endswith(
        "that is the reward model's own opinion, as this data has no gold utility to check it against."
    )


def test_the_reference_alone_is_compared_with_nothing():
    assert sentences({"sft": SFT}, None) == [
        "The share of responses that end by themselves, with EOS, is 99.0 % for SFT."
    ]


def test_with_neither_gold_nor_reward_nothing_says_which_is_better():
    said = sentences({"dpo-2": evaluation(reward=None)}, None)
    assert said[0] == "Neither a gold utility nor a reward model says which policy is better than SFT."
    assert "12.34 for dpo-2" in said[1]


def test_perplexity_is_told_where_there_are_texts():
    texts = {"sft_perplexity": 12.345, "sft_rows": 1500}
    assert sentences({"base": texts | {"sft_perplexity": 99.0}, "sft": texts}, None) == [
        "The perplexity of 1,500 test texts is 99 for base and 12.3 for SFT."
    ]
    assert sentences({}, None) == ["Nothing was evaluated."]


def test_the_reward_model_against_guessing_and_bayes():
    def said(accuracy, low, high, bayes=None, **known):
        metrics = {"accuracy": accuracy, "accuracy_ci_low": low, "accuracy_ci_high": high}
        known |= {} if bayes is None else {"bayes_accuracy": bayes}
        return sentences({"sft": SFT}, metrics, **known)[0]

    assert "which cannot be told from guessing); the best accuracy that could be reached" in said(0.52, 0.48, 0.56)
    assert "which is worse than guessing" in said(0.42, 0.38, 0.46)
    assert "guessing" not in said(0.6, 0.56, 0.64)
    assert "1.0 points above the Bayes accuracy of 80.0 %" in said(0.81, 0.77, 0.85, bayes=0.8)
    assert said(0.7, 0.6, 0.8, bayes=0.77, gold_label_accuracy=0.757).endswith(
        "the most that any model can expect; on these labels, as they were drawn, the gold utility has 75.7 %."
    )


def test_a_policy_below_the_line_is_called_over_optimised():
    def of(mean, low, high, measure="gold"):
        parts = {"mean": mean, "ci_low": low, "ci_high": high}
        return evaluation((0.4, 0.3, 0.5)) | {f"{measure}_residual_{part}": value for part, value in parts.items()}

    policies = {"sft": SFT, "dpo": of(-0.1, -0.2, 0.01), "ppo": of(-0.684, -0.9, -0.47)}
    assert sentences(policies)[1] == (
        "Over-optimised: the mean gold utility lies below that of held-out replies with the same reward by 0.68 (95 % "
        "interval 0.47 to 0.90) for PPO; such a policy exploits what the reward model gets wrong."
    )
    assert sentences({"sft": SFT, "dpo": of(-0.1, -0.2, 0.01)})[1] == (
        "No policy's mean gold utility lies clearly below that of held-out replies with the same reward."
    )
    judged = sentences({"sft": SFT, "ppo": of(-0.3, -0.4, -0.2, "judge")})
    assert "the mean score by the judge lies below that of held-out replies with the same reward by 0.30" in judged[1]
