"""What is done where memory runs out: gradients of half a step forgotten, the step repeated at half the size."""

import errno

import pytest
import torch

from stages.lib.command.errors import StageError
from stages.lib.command.out_of_memory import is_out_of_memory, reason_of
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.engine.torch import TorchEngine
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.runtime import RUNTIME_FILE, Runtime, read_runtime
from tests.tiny_models import CPU, EOS, PAD, tiny_llama

PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 10, 11, 12]]
REPLIES = [[9, EOS], [10, 11, 12, EOS], [13, EOS], [14, 15, 16, EOS]]
OPTIMIZER = OptimizerSettings(
    moments="float32",
    learning_rate=1e-3,
    schedule="constant",
    warmup_ratio=0.0,
    min_learning_rate_ratio=0.0,
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    max_grad_norm=1.0,
    ema_decay=None,
)


def fill_all_memory() -> None:
    torch.empty(2**50, dtype=torch.uint8)


def real_error() -> RuntimeError:
    """What torch raises on a CPU."""
    with pytest.raises(RuntimeError) as caught:
        fill_all_memory()
    return caught.value


def test_memory_that_ran_out_is_told_from_other_errors() -> None:
    texts = ["CUDA out of memory. Tried to allocate 20.00 MiB", "CUDA error: out of memory"]
    texts += ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
    for error in (real_error(), MemoryError(), torch.OutOfMemoryError(texts[0]), *map(RuntimeError, texts)):
        assert is_out_of_memory(error)
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    for other in (None, RuntimeError("mat1 and mat2 shapes"), OSError(errno.ENOENT, "no such file"), KeyError()):
        assert not is_out_of_memory(other)
    assert "can't allocate memory" in reason_of(real_error())
    assert reason_of(MemoryError()) == "MemoryError"
    assert "\n" not in reason_of(RuntimeError("a\nb" * 500))
    assert len(reason_of(RuntimeError("a\nb" * 500))) < 200


def budget_of(size: int, *, may_halve: bool = True) -> MemoryBudget:
    return MemoryBudget("micro_batch_tokens", size, may_halve=may_halve)


def test_a_computation_is_repeated_at_half_the_size_that_stays(capsys: pytest.CaptureFixture) -> None:
    budget = budget_of(100)
    sizes = []

    def compute() -> int:
        sizes.append(budget.size)
        if budget.size > 30:
            fill_all_memory()
        return budget.size

    assert budget.attempt(compute) == 25
    assert sizes == [100, 50, 25]
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split("repeated with ")[1].split(",")[0] for line in warnings] == [
        "micro_batch_tokens 50",
        "micro_batch_tokens 25",
    ]
    assert all("the last digits may differ" in line for line in warnings)
    assert budget.attempt(compute) == 25
    resumed, changed = budget_of(100), budget_of(90)
    for other in (resumed, changed):
        other.load_state_dict(budget.state_dict())
    assert (resumed.size, changed.size) == (25, 90)  # who asks for another size gets it


def test_without_retry_and_for_other_errors_nothing_is_repeated() -> None:
    calls = []

    def fail(error: Exception) -> None:
        calls.append(error)
        raise error

    with pytest.raises(MemoryError):
        budget_of(100, may_halve=False).attempt(lambda: fail(MemoryError()))
    with pytest.raises(RuntimeError, match="shapes"):
        budget_of(100).attempt(lambda: fail(RuntimeError("shapes")))
    assert len(calls) == 2


def test_a_single_row_that_does_not_fit_ends_it() -> None:
    budget = budget_of(40)
    batching = MicroBatching(budget, False, PAD, Processes(0, 1, CPU))
    rows = []

    def compute() -> None:
        for batch in batching.sequences(PROMPTS, REPLIES):
            rows.append(len(batch.rows))
            fill_all_memory()

    with pytest.raises(StageError, match=r"^out of memory \(.*\) on a single row, which runtime.yaml: micro_batch_tok"):
        budget.attempt(compute)
    assert rows == [4, 1]  # the widest row goes alone
    one = budget_of(1)
    with pytest.raises(StageError, match="on a single row"):
        one.attempt(fill_all_memory)


def gradients(size: int, *, fits: int, precision: torch.dtype) -> tuple[dict[str, torch.Tensor], float]:
    """Masters' gradients of a step whose passes run out of memory after one, while it has more than `fits` rows."""
    runtime = read_runtime("train_sft")
    engine = TorchEngine(TokenLogProbs(tiny_llama().to(precision)), OPTIMIZER, 10, runtime, Processes(0, 1, CPU))
    batching = MicroBatching(budget_of(size), False, PAD, Processes(0, 1, CPU))

    def passes() -> float:
        total = 0.0
        for batch in batching.sequences(PROMPTS, REPLIES):
            logps, _ = engine(*batch.inputs, batch.completion_mask)
            engine.backward(-logps.sum() / 12)
            total -= float(logps.detach().sum())
            if len(batch.rows) > fits:
                fill_all_memory()
        return total

    loss = batching.budget.attempt(passes, engine)
    return {name: master.grad.clone() for name, master in engine.masters.items()}, loss


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_gradients_are_those_of_the_smaller_size_alone(precision: torch.dtype) -> None:
    found, loss = gradients(32, fits=1, precision=precision)
    expected, expected_loss = gradients(8, fits=1, precision=precision)
    assert loss == expected_loss
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
        assert gradient.dtype == torch.float32


def runtime_with(**values: object) -> Runtime:
    return Runtime(**dict(read_runtime("train_sft")) | values)


def test_the_default_is_to_stop() -> None:
    assert load_yaml(RUNTIME_FILE)["default"]["on_out_of_memory"] == "stop"


@pytest.mark.parametrize("knob", [{"zero_stage": 2}, {"engine": "deepspeed"}, {"frozen_zero_stage": 3}])
def test_a_retry_needs_plain_torch(knob: dict) -> None:
    with pytest.raises(ValueError, match="on_out_of_memory: retry needs plain torch"):
        runtime_with(on_out_of_memory="retry", **knob)
    assert runtime_with(on_out_of_memory="retry").on_out_of_memory == "retry"
