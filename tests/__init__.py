"""Tests compute with the kernels that the stages they start are told to use: torch is not imported before this."""

import os

from stages.lib.command.kernels import AVX2_ALONE, has_avx2

if has_avx2():
    os.environ.update(AVX2_ALONE)
