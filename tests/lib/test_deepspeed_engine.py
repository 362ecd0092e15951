"""What ZeRO 3 hands out: every process computes with the weights and buffers of the first."""

from pathlib import Path

import pytest

from tests.two_processes import run_on_two_processes

SCRIPT = """
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.lib.deepspeed_engine import sharded
from stages.lib.errors import StageError
from stages.lib.processes import join_processes
from stages.lib.runtime import read_runtime


class Scaled(nn.Module):
    def __init__(self, rank, width=3):
        super().__init__()
        self.linear = nn.Linear(width, 2, bias=False)
        nn.init.constant_(self.linear.weight, 1.0 + 10 * rank)
        self.register_buffer("scale", torch.tensor(2.0 + 100 * rank))

    def forward(self, inputs):
        return self.scale * self.linear(inputs)


runtime = replace(read_runtime("train_sft"), frozen_zero_stage=3)
processes = join_processes(runtime)
model = sharded(Scaled(processes.rank).requires_grad_(False), runtime, processes)
assert model(torch.ones(1, 3)).tolist() == [[6.0, 6.0]]
with pytest.raises(StageError, match="its files hold other weights than its config.json"):
    sharded(Scaled(0, width=3 + processes.rank).requires_grad_(False), runtime, processes)
Path(f"{processes.rank}.done").touch()
processes.leave()
"""


@pytest.mark.slow
def test_the_first_process_hands_out_its_weights_and_buffers(tmp_path: Path) -> None:
    run_on_two_processes(SCRIPT, tmp_path)
