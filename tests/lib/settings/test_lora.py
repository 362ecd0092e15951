"""A `lora:` block is read strictly: what cannot be trained is refused with the key named."""

from typing import Any

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.settings.lora import LoraSettings, quantization_of_base

BLOCK = {
    "rank": 4,
    "alpha": 8,
    "targets": "all-linear",
    "experts": False,
    "routers": False,
    "rslora": False,
    "base_quantization": None,
    "save_adapter": False,
}


def test_a_block_is_read_with_a_word_or_a_list_of_targets() -> None:
    assert build(LoraSettings, BLOCK, "lora").targets == "all-linear"
    assert build(LoraSettings, {**BLOCK, "targets": ["q_proj", "v_proj"]}, "lora").targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1 and at most 65536, found 0"),
        ({"alpha": -1}, "lora.alpha must be at least 1, found -1"),
        ({"targets": "all"}, "lora.targets: expected all-linear or a list of layer names, found 'all'"),
        ({"targets": []}, r"targets must name at least one layer, and each once, found \[\]"),
        ({"targets": ["q_proj", "q_proj"]}, "each once"),
        ({"targets": ["q_proj", 3]}, r"lora.targets\[1\]: expected text, found 3"),
        ({"targets": None}, "lora.targets: expected all-linear or a list of layer names, found nothing"),
        ({"base_quantization": "nf8"}, "lora.base_quantization: .* is not one of: nf4"),
        ({"dropout": 0.1}, "lora.dropout is not a known key"),
    ],
)
def test_a_wrong_block_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=message):
        build(LoraSettings, {**BLOCK, **changed}, "lora")


def test_without_a_block_the_base_is_whole() -> None:
    assert build(LoraSettings | None, None, "lora") is None
    assert quantization_of_base(None) is None
    assert quantization_of_base(build(LoraSettings, {**BLOCK, "base_quantization": "nf4"}, "lora")) == "nf4"
