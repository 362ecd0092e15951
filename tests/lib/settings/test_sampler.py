"""What a sampler cannot do is refused before anything is loaded."""

from typing import Any

import pytest
from pydantic import ValidationError

from stages.lib.settings.declaration import block
from stages.lib.settings.sampler import TransformersSampling, VllmSampling
from stages.lib.settings.train_grpo import TrainGrpo
from stages.lib.settings.train_ppo import TrainPpo
from stages.lib.settings.vllm_server import VllmServer


@pytest.mark.parametrize("section", [TrainGrpo, TrainPpo])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sampler": block(VllmSampling), "reuse_sampler_logps": True}, "a sampler of type vllm gives no entropies"),
        ({"sampler": block(VllmSampling, pushes="adapter")}, "sampler.pushes: adapter needs one, and lora is null"),
        ({"sampler": block(TransformersSampling), "stop_strings": ["."]}, "transformers knows no stop_strings"),
        (
            {"sampler": block(TransformersSampling), "min_new_tokens": 2},
            "transformers knows no stop_strings",
        ),
        ({"sampler": {"type": "own", "tolerance": 0.1}}, "tolerance"),
    ],
)
def test_what_a_sampler_cannot_do(section: type, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        section(**block(section, **changed))


@pytest.mark.parametrize(
    ("changed", "whole"),
    [
        ({}, True),
        ({"top_k": 5}, False),
        ({"top_p": 0.9}, False),
        ({"min_new_tokens": 1}, True),
        ({"min_new_tokens": 2}, False),
    ],
)
def test_when_an_engines_log_probs_are_the_policys(changed: dict[str, Any], whole: bool) -> None:
    settings = TrainGrpo(**block(TrainGrpo, sampler=block(VllmSampling), **changed))
    assert settings.draws_from_all == settings.keeps_engine_logps == whole


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"options": ["--quantization=fp8"]}, "options: --quantization=fp8 is set by the pipeline"),
        ({"options": ["--logprobs_mode", "raw_logprobs"]}, "options: --logprobs_mode is set"),
        ({"address": "http://user:secret@host:8000"}, "address must hold no password"),
        ({"address": "localhost"}, "address must be such as http://127.0.0.1:8000"),
        ({"address": "http://host:8000", "options": ["--enforce-eager"]}, "program and options start a server"),
        ({"token_variable": "TOKEN"}, "token_variable is for a server at address"),
    ],
)
def test_a_server_is_started_or_there(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        VllmServer(**block(VllmServer, **changed))
