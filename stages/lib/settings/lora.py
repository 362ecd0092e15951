"""The settings of low-rank adapters: which layers get one, of what size, on what base, and whether they are saved."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from stages.lib.settings.bounds import Count

ALL_LINEAR = "all-linear"
BaseQuantization = Literal["nf4"] | None


@dataclass(frozen=True)
class LoraSettings:
    """A `lora:` block of `params.yaml`; the file explains each key."""

    rank: Annotated[int, Ge(1), Le(65_536)]
    alpha: Count
    targets: str | tuple[str, ...]
    rslora: bool
    base_quantization: BaseQuantization
    save_adapter: bool

    def __post_init__(self) -> None:
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            raise ValueError(f"targets must be {ALL_LINEAR} or a list of layer names, found '{self.targets}'")
        if isinstance(self.targets, tuple) and (not self.targets or len(set(self.targets)) != len(self.targets)):
            raise ValueError(f"targets must name at least one layer, and each once, found {list(self.targets)}")


def quantization_of_base(settings: LoraSettings | None) -> BaseQuantization:
    """How the base model is held: its own weights unless there are adapters on a quantised one."""
    return None if settings is None else settings.base_quantization
