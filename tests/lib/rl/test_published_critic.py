"""The critic as a folder: what transformers reads there says of each state what the critic says."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.lib.command.errors import StageError
from stages.lib.rl.published_critic import PublishedCritic, published_critic
from stages.lib.rl.trained_critic import TrainedCritic
from stages.lib.rl.trained_policy import load_policy
from stages.lib.settings.lora import LoraSettings
from tests.given_reward_models import CONFIGS, save_tokenizer, save_value_head
from tests.lib.rl.test_trained_critic import IDS, LOADING, LORA, OPTIMIZER, folder_of, started, values
from tests.tiny_models import batching

INPUTS = (torch.tensor([IDS]), None, torch.arange(len(IDS))[None])


def read_back(critic: PublishedCritic, folder: Path, source: Path) -> list[float]:
    """The logit of the written folder at each token."""
    critic.writer(source, "float32")(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "critic").eval()
    assert model.config.num_labels == 1
    with torch.no_grad():
        return [float(model(torch.tensor([IDS[: end + 1]])).logits) for end in range(len(IDS))]


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("kind", ["llama", "v_head", "language model"])
def test_a_critic_of_its_own(kind: str, lora: LoraSettings | None, tmp_path: Path) -> None:
    folder = tmp_path / "start"
    if kind == "v_head":
        save_value_head(folder, kind, bias=False)
        save_tokenizer(folder)
    else:
        folder_of(folder, kind)
    reward_model = folder if kind != "language model" else folder_of(tmp_path / "rm", "llama")
    critic = started(folder, reward_model, folder, None, lora)
    assert critic.engine is not None
    assert critic.lora is not None
    critic.engine.backward(critic.engine(*INPUTS).sum())
    critic.engine.step()
    published = PublishedCritic(critic.engine, critic.lora, folder)
    assert read_back(published, tmp_path / "out", folder) == pytest.approx(values(critic), abs=1e-5)


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_value_head_on_the_policys_body(lora: LoraSettings | None, tmp_path: Path) -> None:
    folder = tmp_path / "sft"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **CONFIGS["llama"])).save_pretrained(folder)
    save_tokenizer(folder)
    policy = load_policy(folder, None, lora, OPTIMIZER, 10, 3, LOADING, batching(1).processes, value_head=True)
    targets = torch.tensor([[False] + [True] * (len(IDS) - 1)])
    read = policy.engine(*INPUTS, targets)
    policy.engine.backward(read.logps.sum() + read.values.sum())
    policy.engine.step()
    with torch.no_grad():
        wanted = policy.engine(*INPUTS, targets).values[0, 1:].tolist()
    published = published_critic(policy, TrainedCritic(None, None, None), folder)
    assert read_back(published, tmp_path / "out", folder)[:-1] == pytest.approx(wanted, abs=1e-5)


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rm", "v_head.summary")
    critic = started(folder, folder, folder)
    with pytest.raises(StageError, match=r"critic\.publish: the head of .*/rm has a bias"):
        PublishedCritic(critic.engine, critic.lora, folder)
