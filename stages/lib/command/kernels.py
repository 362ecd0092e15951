"""Which kernels torch computes with on a CPU: those of AVX2 on any x86-64 processor that has it, or its fastest.

With vectors of another width sums are added up in another order, so an AVX-512 processor and one with AVX2 alone round
differently, and training makes much of it. The libraries read their environment variables once, when they are loaded.
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal

from stages.lib.command.errors import StageError
from stages.lib.command.params import PARAMS_FILE
from stages.lib.command.strict_yaml import load_yaml

Kernels = Literal["portable", "fastest"]
CPU_FACTS = Path("/proc/cpuinfo")
# For torch's own kernels, those of oneDNN and those of MKL. MKL's "strict" is what makes a matrix product the same
# whatever its size and the number of threads.
AVX2_ALONE = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_CBWR": "AVX2,STRICT",
}


def has_avx2(cpu_facts: Path = CPU_FACTS) -> bool:
    """Whether this is an x86-64 processor with AVX2, going by what Linux says of it."""
    try:
        text = cpu_facts.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "avx2" in flags.split()


def choose_kernels(
    params: Path = PARAMS_FILE, environment: MutableMapping[str, str] = os.environ, cpu_facts: Path = CPU_FACTS
) -> None:
    """Set what torch and its libraries read, as `kernels` in params.yaml says; before torch is imported.

    A processor without AVX2, and an Arm, computes with kernels of its own either way. A params.yaml that cannot be read
    is refused where the stage reads its section.

    Raises:
        RuntimeError: torch has been imported under another choice.
    """
    try:
        kernels = load_yaml(params).get("kernels")
    except (StageError, OSError):
        return
    if kernels not in ("portable", "fastest") or not has_avx2(cpu_facts):
        return
    chosen = AVX2_ALONE if kernels == "portable" else {}
    if "torch" in sys.modules and chosen != {name: environment[name] for name in AVX2_ALONE if name in environment}:
        raise RuntimeError("torch has been imported, and computes with other kernels")
    for name in AVX2_ALONE:
        environment.pop(name, None)
    environment.update(chosen)
