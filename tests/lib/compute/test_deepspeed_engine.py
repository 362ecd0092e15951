"""What ZeRO 3 hands out, how plain torch sums up, and which keys DeepSpeed takes from runtime.yaml."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.loaded_python import loaded_python
from tests.real_files import PROJECT
from tests.two_processes import run_on_two_processes

SCRIPT = """
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.lib.compute.engine import torch as engine_torch
from stages.lib.compute.engine.deepspeed_setup import sharded
from stages.lib.compute.frozen_model import fill
from stages.lib.command.errors import StageError
from stages.lib.compute.processes import join_processes
from stages.lib.settings.runtime import read_runtime


class Scaled(nn.Module):
    def __init__(self, rank, width=3):
        super().__init__()
        self.linear = nn.Linear(width, 2, bias=False)
        nn.init.constant_(self.linear.weight, 1.0 + 10 * rank)
        self.register_buffer("scale", torch.tensor(2.0 + 100 * rank))

    def forward(self, inputs):
        return self.scale * self.linear(inputs)


runtime = read_runtime("train_sft").model_copy(update={"frozen_zero_stage": 3})
processes = join_processes(runtime)
model = sharded(Scaled(processes.rank).requires_grad_(False), runtime, processes)
assert model(torch.ones(1, 3)).tolist() == [[6.0, 6.0]]
for factor in (3.0, 4.0):  # twice, with a pass between, which leaves weights gathered
    others = {"linear.weight": torch.full((2, 3), factor), "scale": torch.tensor(factor)}
    fill(model.module, others.__getitem__)
    assert model(torch.ones(1, 3)).tolist() == [[3 * factor**2] * 2]
with pytest.raises(StageError, match="its files hold other weights than its config.json"):
    sharded(Scaled(0, width=3 + processes.rank).requires_grad_(False), runtime, processes)

engine_torch.PIECE = 5  # numbers exchanged at a time
weights = [nn.Parameter(torch.zeros(size)) for size in ((2, 2), (3,), (4, 2), (1,))]
for place, weight in enumerate(weights):
    if place != 1 or processes.is_main:  # the other process has none there
        weight.grad = torch.arange(float(weight.numel())).view_as(weight) + 10 * processes.rank + place
engine_torch.sum_gradients(weights, processes)
found = [weight.grad.flatten().tolist() for weight in weights]
assert found == [[10, 12, 14, 16], [1, 2, 3], [14, 16, 18, 20, 22, 24, 26, 28], [16]]
Path(f"{processes.rank}.done").touch()
processes.leave()
"""


@pytest.mark.slow
def test_weights_are_handed_out_and_gradients_summed(tmp_path: Path) -> None:
    run_on_two_processes(SCRIPT, tmp_path)


KEYS = """
import json, sys
import torch
from stages.lib.compute.engine.choice import new_engine
from stages.lib.command.errors import StageError
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.compute.processes import Processes
from stages.lib.settings.runtime import Runtime
from tests.lib.compute.test_engine import CPU, PROJECT, settings

for dtype, zero_stage, keys in json.loads(sys.argv[1]):
    default = load_yaml(PROJECT / "runtime.yaml")["default"]
    runtime = Runtime(**default | {"zero_stage": zero_stage, "deepspeed": keys})
    model = torch.nn.Linear(3, 2).to(getattr(torch, dtype))
    try:
        new_engine(model, settings(), 1, runtime, Processes(0, 1, CPU))
        print("taken")
    except StageError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_key_that_deepspeed_does_not_know_is_named() -> None:
    tried = [
        ("float32", 2, {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": False}),
        ("float32", 2, {"overlap_comm": True}),
        ("float32", 2, {"zero_optimization": {"overlap_com": True}}),
        ("float32", 2, {"zero_optimization": {"reduce_bucket_size": "large"}}),
        ("bfloat16", 0, {"zero_optimization": {"overlap_comm": True}}),
        ("float32", 1, {"zero_optimization": {"overlap_comm": True}}),
        ("float32", 2, {"activation_checkpointing": 5}),
        ("float32", 2, {"elasticity": {"enabled": True}}),
        ("float32", 2, {"tensor_parallel": {"autotp_size": 2}}),
        ("float32", 2, {"csv_monitor": {"enabled": True, "output_path": "/proc/none", "job_name": "a"}}),
        ("float32", 2, {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}),
    ]
    words = [*loaded_python(), "-c", KEYS, json.dumps(tried)]
    done = subprocess.run(
        words, cwd=PROJECT, env={**os.environ, "PYTHONPATH": str(PROJECT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    taken, unknown, misspelt, mistyped, idle, *refused, ratio = done.stdout.splitlines()[-11:]
    assert taken == "taken"
    assert unknown == "runtime.yaml: deepspeed.overlap_comm: DeepSpeed has no such key"
    assert misspelt.startswith("runtime.yaml: deepspeed: overlap_com: Extra inputs are not permitted")
    assert mistyped.startswith("runtime.yaml: deepspeed: reduce_bucket_size: Input should be a valid integer")
    assert idle == "runtime.yaml: deepspeed: in bf16 these keys need zero_stage 1, 2 or 3"
    assert all(line.startswith("runtime.yaml: deepspeed: DeepSpeed refuses {'") for line in refused), refused
    assert "supports ZeRO overlap_comm only with ZeRO stage 2" in refused[0]
    assert all(line.split(" here: ")[1] for line in refused), refused
    assert ratio.startswith("runtime.yaml: deepspeed: Assertion failed, ")


SORTED = """
from pathlib import Path

import pytest

from stages.lib.compute.engine.choice import new_engine
from stages.lib.command.errors import StageError
from stages.lib.compute.processes import join_processes
from stages.lib.settings.runtime import read_runtime
from tests.lib.compute.test_engine import MeanLogProb, settings
from tests.tiny_models import tiny_llama

keys = {"zero_optimization": {"round_robin_gradients": True}}
runtime = read_runtime("train_sft").model_copy(update={"zero_stage": 2})
processes = join_processes(runtime)
new_engine(MeanLogProb(tiny_llama()), settings(), 1, runtime, processes)
for stage in (1, 2):
    changed = runtime.model_copy(update={"zero_stage": stage, "deepspeed": keys})
    with pytest.raises(StageError, match="round_robin_gradients': True.*mixes up the weights that are saved"):
        new_engine(MeanLogProb(tiny_llama()), settings(), 1, changed, processes)
    sharded = runtime.model_copy(update={"zero_stage": stage})
    new_engine(MeanLogProb(tiny_llama()).bfloat16(), settings(), 1, sharded, processes)
Path(f"{processes.rank}.done").touch()
processes.leave()
"""


@pytest.mark.slow
def test_settings_under_which_masters_are_of_other_weights_are_refused(tmp_path: Path) -> None:
    run_on_two_processes(SORTED, tmp_path)
