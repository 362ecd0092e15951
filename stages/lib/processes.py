"""The processes of one launch: who am I, what is my share, and sums over all of us."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stages.lib.errors import StageError
from stages.lib.runtime import Runtime

Item = TypeVar("Item")
VECTOR_FUNCTIONS = (torch.acos, torch.asin, torch.atan, torch.cos, torch.erf, torch.erfc, torch.erfinv, torch.exp)
VECTOR_FUNCTIONS += (torch.log, torch.log10, torch.sin, torch.sqrt, torch.tan, torch.tanh)  # ATen/cpu/vml.h


@dataclass(frozen=True)
class Processes:
    """This process's place among the `world_size` processes of a launch. Every collective is called by all of them."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and speaks to the console."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of a list that all hold; the parts may differ by one item or be empty."""
        return list(items[self.rank :: self.world_size])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the processes, in float64."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """True in all processes if `flag` is true in one."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """All processes' items, in all processes, put back in the order that `share` took them from."""
        if self.world_size == 1:
            return list(items)
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, list(items))
        total = sum(len(part) for part in parts)
        return [parts[index % self.world_size][index // self.world_size] for index in range(total)]

    def gather_rows(self, own: Mapping[int, Item]) -> list[Item]:
        """The items of rows 0 to n - 1 in all processes; each row is in the `own` of one process."""
        parts: list[Any] = [dict(own)]
        if self.world_size > 1:
            parts *= self.world_size
            dist.all_gather_object(parts, dict(own))
        rows = {row: item for part in parts for row, item in part.items()}
        return [rows[row] for row in range(len(rows))]

    def broadcast(self, value: Item) -> Item:
        """The main process's `value`, in all processes."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_tensor(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """The main process's `tensor` (on its CPU), on the CPU of all processes."""
        if self.world_size == 1:
            return tensor
        shape, dtype = self.broadcast((tensor.shape, tensor.dtype) if self.is_main else None)
        everywhere = torch.empty(shape, dtype=dtype, device=self.device)
        if self.is_main:
            everywhere.copy_(tensor)
        dist.broadcast(everywhere, src=0)
        return everywhere.cpu()

    def in_main(self, action: Callable[[], Item]) -> Item | None:
        """Run `action` in the main process, where it may raise a StageError that all processes then raise.

        Returns its value in the main process, None in the others.
        """
        value, message = None, None
        if self.is_main:
            try:
                value = action()
            except StageError as error:
                message = str(error)
        message = self.broadcast(message)
        if message is not None:
            raise StageError(message)
        return value

    def leave(self) -> None:
        """Wait for all and close the process group."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def join_processes(runtime: Runtime) -> Processes:
    """Join the launch that the environment describes (torchrun sets RANK, WORLD_SIZE and so on), or stand alone.

    Raises:
        StageError: `runtime.yaml` asks for a GPU and there is none.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    device = choose_device(runtime, local_rank)
    torch.set_num_threads(max(1, runtime.threads // local_world_size))
    make_deterministic()
    # transformers imports DeepSpeed to save a model, which otherwise warns that it had to find the device itself.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return Processes(dist.get_rank(), dist.get_world_size(), device)
    return Processes(0, 1, device)


def choose_device(runtime: Runtime, local_rank: int) -> torch.device:
    if runtime.device == "cpu" or (runtime.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise StageError("runtime.yaml: device: cuda, but torch finds no GPU here; set it to auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise StageError(f"process {local_rank + 1} of this machine has no GPU: there are {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def make_deterministic() -> None:
    """Have torch choose kernels that give the same bytes at every run, and refuse those that cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Does what use_deterministic_algorithms(True) does, without its import of the compiler, which takes 2 seconds.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory before it is written
    torch.backends.cuda.matmul.allow_tf32 = False
    settle_vector_maths()


def settle_vector_maths() -> None:
    """Call each of MKL's vector functions once, on one element, before several threads can be the first to call it.

    MKL 2024, which torch's wheels hold, chooses a function's kernel at its first call. When two threads make that call
    together, one of them may get the kernel of low accuracy: its share of the result, such as half of the cosines of
    the first forward pass, is then off by 1e-4, in about one process of 200 on a busy machine
    (github.com/pytorch/pytorch/issues/188792).
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for function in VECTOR_FUNCTIONS:
            function(one)
