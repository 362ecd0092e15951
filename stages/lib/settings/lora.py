"""The settings of low-rank adapters: which layers get one, of what size, on what base, and whether they are saved."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import Discriminator, Tag, model_validator

from stages.lib.settings.bounds import Count, Several, Text
from stages.lib.settings.declaration import Settings, key

ALL_LINEAR = "all-linear"
BaseQuantization = Literal["nf4"] | None


def kind_of_targets(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        return "names"
    return "word" if value == ALL_LINEAR else None


Targets = Annotated[
    Annotated[Literal["all-linear"], Tag("word")] | Annotated[Several[Text], Tag("names")],
    Discriminator(
        kind_of_targets,
        custom_error_type="targets",
        custom_error_message=f"{ALL_LINEAR} or a list of layer names",
    ),
]


class LoraSettings(Settings):
    """Low-rank adapters on a frozen base: W x becomes W x + s B A x (LoRA, arXiv 2106.09685)."""

    rank: Annotated[int, Ge(1), Le(65_536)] = key(16, "r, of the update s·B·A", source="arXiv 2106.09685, section 4.1")
    alpha: Count = key(32, "s = alpha / rank", source="arXiv 2106.09685, section 4.1")
    targets: Targets = key(
        ALL_LINEAR,
        "all-linear: every linear layer of the body; or names of layers, such as [q_proj, v_proj]; heads and "
        "embeddings get no adapter",
    )
    experts: bool = key(
        False, "adapt the experts of a mixture too, each with matrices of its own; no name in targets means them"
    )
    routers: bool = key(False, "adapt the routers of a mixture of experts too")
    rslora: bool = key(
        False, "s = alpha / √rank, which keeps the update's size at high ranks", source="arXiv 2312.03732"
    )
    base_quantization: BaseQuantization = key(
        None,
        "nf4: hold the frozen base in 4 bits (QLoRA), where bitsandbytes runs; what is published is then the "
        "dequantised base with the adapter merged in, which is the model that was trained and evaluated",
        source="arXiv 2305.14314, section 3",
    )
    save_adapter: bool = key(
        False,
        "also write the adapter in PEFT's format, to the folder `adapter` in the model's; the merged weights are "
        "always there",
    )

    @model_validator(mode="after")
    def _check(self) -> "LoraSettings":
        if isinstance(self.targets, tuple) and (not self.targets or len(set(self.targets)) != len(self.targets)):
            raise ValueError(f"targets must name at least one layer, and each once, found {list(self.targets)}")
        return self


def quantization_of_base(settings: LoraSettings | None) -> BaseQuantization:
    """How the base model is held: its own weights unless there are adapters on a quantised one."""
    return None if settings is None else settings.base_quantization
