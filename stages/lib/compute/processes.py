"""The processes of one launch: who am I, what is my share, and sums over all of us."""

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import file_hash
from stages.lib.command.params import PARAMS_FILE
from stages.lib.operations.code_closure import running_hash
from stages.lib.settings.runtime import RUNTIME_FILE, Runtime

# A launcher starts all processes at about the same time; those of another machine may have to be started by hand.
JOIN_TIMEOUT = timedelta(minutes=10)
# While the main process hashes inputs (2 s a GB) or writes models, the others wait in a collective. A death is noticed
# at once by the launcher or the connection, whatever this is.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
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
        if self.world_size == 1 and tensor is not None:
            return tensor
        kind = self.broadcast(None if tensor is None else (tensor.shape, tensor.dtype))
        assert kind is not None, "the main process has a tensor"
        everywhere = torch.empty(kind[0], dtype=kind[1], device=self.device)
        if self.is_main and tensor is not None:
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


class Place(NamedTuple):
    """A process's place as its launcher put it into the environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def join_processes(runtime: Runtime) -> Processes:
    """Join the launch that the environment describes (RANK, WORLD_SIZE and so on), or stand alone.

    Raises:
        StageError: the environment is incomplete, the others cannot be met, or they were started differently;
            `runtime.yaml` asks for a GPU and there is none.
    """
    place = read_place(os.environ)
    device = choose_device(runtime, place.local_rank)
    torch.set_num_threads(max(1, runtime.threads // place.local_world_size))
    make_deterministic()
    # transformers imports DeepSpeed to save a model, which otherwise warns that it had to find the device itself.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if place.world_size == 1:
        return Processes(0, 1, device)
    meet(place, "nccl" if device.type == "cuda" else "gloo")
    processes = Processes(place.rank, place.world_size, device)
    require_same_work(processes.gather([own_work()]))
    return processes


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that torchrun, the deepspeed launcher or `stages/slurm_rank.sh` describe; rank 0 of 1 without them.

    Raises:
        StageError: a variable is missing or no number, or Slurm started processes that do not know of each other.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in environment and tasks != "1":
        raise StageError(
            f"srun started {tasks} processes that do not know of each other; end LAUNCH in `sh stages/slurm_rank.sh`"
        )

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            if name in environment:
                if not environment[name].isdecimal():
                    raise StageError(f"environment variable {name} is no number: {environment[name]!r}")
                return int(environment[name])
        if default is None:
            raise StageError(f"WORLD_SIZE is {world_size}, but {names[0]} is not set; start the stage by a launcher")
        return default

    world_size = number("WORLD_SIZE", default=1)
    if world_size <= 1:
        return Place(0, 1, number("LOCAL_RANK", default=0), 1)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise StageError(f"WORLD_SIZE is {world_size}, but {name} is not set; start the stage by a launcher")
    # The deepspeed launcher says LOCAL_SIZE.
    local_world_size = number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=world_size)
    return Place(number("RANK"), world_size, number("LOCAL_RANK"), max(1, local_world_size))


def meet(place: Place, backend: str) -> None:
    """Make the process group of all processes of the launch."""
    try:
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=JOIN_TIMEOUT))
        store = dist.PrefixStore("stagewise", store)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world_size, timeout=COLLECTIVE_TIMEOUT
        )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise StageError(
            f"process {place.rank} of {place.world_size} could not meet the others at {where}; were all of them "
            f"started, and can this machine reach that one? ({str(error).splitlines()[0]})"
        ) from None


def own_work() -> dict[str, str]:
    """What this process was started to do; `host` says where."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    settings = {str(path): file_hash(path) for path in (PARAMS_FILE, RUNTIME_FILE) if path.is_file()}
    command = " ".join([spec.name if spec else Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"host": socket.gethostname(), "command": command, **settings, "code": running_hash()}


def require_same_work(works: Sequence[Mapping[str, str]]) -> None:
    """Raise StageError if the processes were not started alike: they would wait for each other, or mix two runs."""
    first = works[0]
    for rank, work in enumerate(works):
        for name in [name for name in {**first, **work} if name != "host" and first.get(name) != work.get(name)]:
            where = f"process {rank} ({work['host']})", f"process 0 ({first['host']})"
            if name == "command":
                raise StageError(f"{where[0]} runs `{work[name]}`, but {where[1]} runs `{first[name]}`")
            raise StageError(f"{name} of {where[0]} differs from that of {where[1]}; give all machines the same files")


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
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # torch knows nothing of that package's kernels
    # Does what use_deterministic_algorithms(True) does, without its import of the compiler, which takes 2 seconds.
    torch.set_deterministic_debug_mode("error")
    # Nothing here reads memory before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute] (hidden by torch)
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
