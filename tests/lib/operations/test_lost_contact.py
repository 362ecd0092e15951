"""When one process fails, its own error is what one reads; the others say one line each."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.lib.operations.lost_contact import is_lost_contact
from tests.real_files import PROJECT

SCRIPT = """
import torch
from stages.lib.command.run import run
from stages.lib.compute.processes import join_processes
from stages.lib.settings.runtime import read_runtime


def main() -> None:
    processes = join_processes(read_runtime("train_rm"))
    if processes.rank == 1:
        torch.zeros(2) + torch.zeros(3)
    processes.sum([1.0])


if __name__ == "__main__":
    run(main)
"""


@pytest.mark.slow
def test_the_error_of_one_process_is_not_buried(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "runtime.yaml").write_text((PROJECT / "runtime.yaml").read_text())
    torchrun = Path(sys.executable).with_name("torchrun")
    ended = subprocess.run(
        [str(torchrun), "--standalone", "--nproc_per_node=2", "script.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode != 0
    own = [line for line in ended.stderr.splitlines() if line.startswith("[rank1]")]
    assert any("The size of tensor a (2) must match" in line for line in own)
    assert ended.stderr.count("error: process 0 lost contact with another one; its message") == 1
    assert "[rank0]" not in ended.stderr
    # The launcher blames the process that failed, not the one that noticed.
    assert "rank      : 1 " in ended.stderr.split("Root Cause")[1]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. Check"), True),
        (RuntimeError("[pair.cc:537] Read error [127.0.0.1]:2: Connection reset by peer. This"), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error, NCCL version 2"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("NCCL error: invalid usage: Duplicate GPU detected"), False),
        (BrokenPipeError(32, "Broken pipe"), False),  # of a console that was closed
    ],
)
def test_only_a_broken_connection_is_lost_contact(error: Exception, lost: bool) -> None:
    assert is_lost_contact(error) == lost
