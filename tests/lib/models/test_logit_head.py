"""The head of a model in half precision: its log-probs against float64, its gradients, its place in the model."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from stages.lib.models.logit_head import LogitHead, widen_logits
from stages.lib.models.token_logprobs import TokenLogProbs
from tests.tiny_models import tiny_gpt2, tiny_llama

IDS = torch.randint(3, 500, (2, 60), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(60).expand(2, 60)


def surprised_llama() -> LlamaForCausalLM:
    """With logits as large as those of a trained model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=500, initializer_range=0.8, **sizes)).bfloat16()


def test_log_probs_in_bfloat16_have_no_rounding_of_the_logits() -> None:
    model = surprised_llama()
    rounded = model(input_ids=IDS, position_ids=POSITIONS).logits[:, :-1].float()
    found = TokenLogProbs(model)(IDS, None, POSITIONS, POSITIONS > 0).logps[:, 1:].detach()
    hidden = model.base_model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).last_hidden_state[:, :-1]
    exact = hidden.double() @ model.lm_head.weight.double().T

    def logps(logits: torch.Tensor) -> torch.Tensor:
        return logits.detach().log_softmax(dim=-1).gather(-1, IDS[:, 1:, None])[..., 0]

    assert float((found - logps(exact)).abs().max()) < 2e-5
    assert float((logps(rounded) - logps(exact)).abs().max()) > 5e-3
    assert model(input_ids=IDS, position_ids=POSITIONS).logits.dtype == torch.float32  # as it samples


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_linear_layer(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(16, 50, bias=bias).bfloat16()
    hidden = torch.randn(3, 4, 16).bfloat16()
    weights = torch.randn(3, 4, 50)

    def gradients(head: nn.Module) -> list[torch.Tensor]:
        head.zero_grad()
        own = hidden.clone().requires_grad_()
        (head(own).float() * weights).sum().backward()
        return [tensor.grad for tensor in (own, *head.parameters())]

    ours, theirs = gradients(LogitHead(plain)), gradients(plain)
    assert all(float((one - other).norm() / other.norm()) < 5e-3 for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_model_keeps_its_weights_under_their_names(make: Callable[[], nn.Module]) -> None:
    model = make().bfloat16()
    names, tied = list(model.state_dict()), model.config.tie_word_embeddings
    widen_logits(model)
    assert list(model.state_dict()) == names
    assert isinstance(model.get_output_embeddings(), LogitHead)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_another_precision_is_left_alone() -> None:
    model = tiny_llama()
    head = model.lm_head
    TokenLogProbs(model)
    assert model.lm_head is head
