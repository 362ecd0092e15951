"""The process that samples a phase ahead of the updates, where `asynchronous` is set and our own sampler is chosen."""

from typing import Annotated

from annotated_types import Ge, Le

from stages.lib.settings.bounds import Several, Text
from stages.lib.settings.declaration import Settings, key

Processor = Annotated[int, Ge(0), Le(2**16)]


class SamplingProcessSettings(Settings):
    """What it runs on: it shares nothing with the stage but what these keys let it."""

    threads: Annotated[int, Ge(1), Le(4096)] = key(1, "CPU threads of the process, beside those of the launch")
    processors: Several[Processor] = key(
        [], "numbers of the CPU's processors that it may use; []: those of the stage, with which it then competes"
    )
    visible_gpus: Text | None = key(
        None,
        "what CUDA_VISIBLE_DEVICES is for it, such as 1; null: as for the stage, with which it then shares a GPU",
    )
