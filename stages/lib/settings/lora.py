"""The settings of low-rank adapters: which layers get one, of what size, on what base, and whether they are saved."""

from dataclasses import dataclass
from typing import Literal

ALL_LINEAR = "all-linear"
BaseQuantization = Literal["nf4"] | None


@dataclass(frozen=True)
class LoraSettings:
    """A `lora:` block of `params.yaml`; the file explains each key."""

    rank: int
    alpha: int
    targets: str | tuple[str, ...]
    rslora: bool
    base_quantization: BaseQuantization
    save_adapter: bool

    def __post_init__(self) -> None:
        for key in ("rank", "alpha"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, found {getattr(self, key)}")
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            raise ValueError(f"targets must be {ALL_LINEAR} or a list of layer names, found '{self.targets}'")
        if isinstance(self.targets, tuple) and (not self.targets or len(set(self.targets)) != len(self.targets)):
            raise ValueError(f"targets must name at least one layer, and each once, found {list(self.targets)}")


def quantization_of_base(settings: LoraSettings | None) -> BaseQuantization:
    """How the base model is held: its own weights unless there are adapters on a quantised one."""
    return None if settings is None else settings.base_quantization
