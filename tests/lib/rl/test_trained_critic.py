"""What a critic starts from, and when it and the reward model are one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from stages.lib.command.errors import StageError
from stages.lib.models.pretrained import Loading
from stages.lib.rl.shared_base import WithoutAdapters
from stages.lib.rl.trained_critic import TrainedCritic, load_critic
from stages.lib.settings.declaration import block
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.reward_reading import RewardSettings
from stages.lib.settings.runtime import read_runtime
from tests.given_reward_models import logits_of, save_classifier, save_tokenizer, save_value_head, value_of
from tests.real_files import PROJECT
from tests.tiny_models import CPU, batching

RUNTIME = read_runtime("train_ppo", PROJECT / "runtime.yaml")
LOADING = Loading("fp32", RUNTIME, CPU)
OPTIMIZER = OptimizerSettings(**block(OptimizerSettings))
LORA = LoraSettings(**block(LoraSettings, rank=2))
IDS = [5, 6, 7, 8, 9]


def started(
    critic: Path,
    reward_model: Path,
    policy: Path,
    label: str | None = None,
    lora: LoraSettings | None = None,
    *,
    standardise: bool = False,
) -> TrainedCritic:
    reading = RewardSettings(reward_head=None, reward_label=label, standardise_reward=standardise)
    training = (lora, OPTIMIZER, 10, 3, LOADING)
    return load_critic(critic, reward_model, policy, reading, *training, batching(1000), batching(1).processes)


def values(critic: TrainedCritic) -> list[float]:
    """The critic's values at each token."""
    with torch.no_grad():
        return critic.engine(torch.tensor([IDS]), None, torch.arange(len(IDS))[None])[0].tolist()


def folder_of(path: Path, kind: str) -> Path:
    """A model of a kind, with the tokenizer that all of them have here."""
    if kind == "v_head.summary":
        save_value_head(path, kind, bias=True)
    elif kind == "language model":
        save_value_head(path, "spare", bias=False)
    else:
        save_classifier(path, kind, labels={0: "bad", 1: "good"} if kind == "gpt2" else None)
    save_tokenizer(path)
    return path


@pytest.mark.parametrize(("kind", "label"), [("llama", None), ("gpt2", "good")])
def test_a_critic_from_a_classifier_gives_its_score_at_each_token(kind: str, label: str | None, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rm", kind)
    wanted = [float(logits_of(folder)([IDS[: end + 1]])[0, -1]) for end in range(len(IDS))]
    assert values(started(folder, folder, folder, label)) == pytest.approx(wanted, abs=1e-5)


def test_a_critic_from_a_value_head(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rm", "v_head.summary")
    wanted = [value_of(folder, "v_head.summary", IDS[: end + 1]) for end in range(len(IDS))]
    critic = started(folder, folder, folder)
    assert values(critic) == pytest.approx(wanted, abs=1e-5)
    assert critic.reward_model.score_ids([IDS[:2]], [IDS[2:]]) == pytest.approx(wanted[-1:], abs=1e-5)
    names = {name for name, weight in critic.engine.module.named_parameters() if weight.requires_grad}
    assert {"classifier.score.weight", "classifier.score.bias"} < names


def test_a_critic_from_another_model_whose_label_would_have_to_be_named(tmp_path: Path) -> None:
    """The label that is named is the reward model's, and the critic's own cannot be."""
    critic, reward_model = folder_of(tmp_path / "two", "gpt2"), folder_of(tmp_path / "rm", "llama")
    with pytest.raises(StageError, match=r"^critic .*/two has several heads or labels, .* of .*/rm alone: let critic"):
        started(critic, reward_model, critic)


def test_a_critic_from_a_language_model_has_a_new_head(tmp_path: Path) -> None:
    """Of standard deviation 1/(d+1), from the seed; the body is the language model's."""
    policy, reward_model = folder_of(tmp_path / "sft", "language model"), folder_of(tmp_path / "rm", "llama")
    critic = started(policy, reward_model, policy)
    weight = critic.engine.module.classifier.score.weight
    drawn = torch.empty(1, 16).normal_(std=1 / 17, generator=torch.Generator().manual_seed(3))
    assert torch.equal(weight.detach(), drawn)
    body = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1).base_model.eval()
    with torch.no_grad():
        wanted = body(input_ids=torch.tensor([IDS])).last_hidden_state[0] @ drawn[0]
    assert values(critic) == pytest.approx(wanted.tolist(), abs=1e-5)
    scores = critic.reward_model.score_ids([IDS[:2]], [IDS[2:]])
    assert scores == pytest.approx([float(logits_of(reward_model)([IDS]))], abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "v_head.summary", "gpt2"])
def test_with_adapters_the_reward_model_keeps_its_scores_while_the_critic_learns(kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rm", kind)
    critic = started(folder, folder, folder, "good" if kind == "gpt2" else None, LORA)
    assert isinstance(critic.reward_model.scores, WithoutAdapters) == (kind != "gpt2")  # which its own rule reads
    first, before = critic.reward_model.score_ids([IDS[:2]], [IDS[2:]]), values(critic)
    assert first == pytest.approx(before[-1:], abs=1e-5)
    for _ in range(3):
        critic.engine.backward(critic.engine(torch.tensor([IDS]), None, torch.arange(len(IDS))[None]).sum())
        critic.engine.step()
    assert values(critic)[-1] < before[-1] - 1e-4
    assert critic.reward_model.score_ids([IDS[:2]], [IDS[2:]]) == first


@pytest.mark.parametrize("lora", [None, LORA])
def test_rewards_are_standardised_and_values_are_not(tmp_path: Path, lora: LoraSettings | None) -> None:
    """Also where the reward model is the critic's frozen base."""
    folder = tmp_path / "rm"
    save_classifier(folder, "llama", mean=-0.25, std=0.5)
    save_tokenizer(folder)
    plain, scaled = (started(folder, folder, folder, None, lora, standardise=asked) for asked in (False, True))
    (score,) = plain.reward_model.score_ids([IDS[:2]], [IDS[2:]])
    assert scaled.reward_model.score_ids([IDS[:2]], [IDS[2:]]) == pytest.approx([(score + 0.25) / 0.5])
    assert values(scaled) == values(plain)


def test_the_label_is_the_reward_models_alone(tmp_path: Path) -> None:
    critic, reward_model = folder_of(tmp_path / "rm", "llama"), folder_of(tmp_path / "given", "gpt2")
    (score,) = started(critic, reward_model, critic, "good").reward_model.score_ids([IDS[:2]], [IDS[2:]])
    assert score == pytest.approx(float(logits_of(reward_model)([IDS])[0, 1]), abs=1e-5)


def test_a_critic_must_read_the_policys_tokens(tmp_path: Path) -> None:
    folder, policy = folder_of(tmp_path / "rm", "llama"), tmp_path / "sft"
    save_tokenizer(policy, template="{{ messages[0].content }}")
    message = r"rm has another tokenizer than .*sft, and a critic judges each .*: let critic name .*sft \(its body with"
    with pytest.raises(StageError, match=message):
        started(folder, folder, policy)
    encoder = folder_of(tmp_path / "roberta", "roberta")
    with pytest.raises(StageError, match=r"roberta has no head that could judge each token, .*; let critic name"):
        started(encoder, encoder, encoder)
