"""A vLLM server that a stage starts for itself, in vLLM's own environment, and that ends with the stage."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from stages.lib.rl.samplers.sampler import SamplerError
from stages.lib.rl.samplers.vllm_connection import VllmConnection
from stages.lib.settings.vllm_server import VllmServer

ENDING_SECONDS = 20.0
# Of a launcher, which vLLM would take for its own.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


class VllmProcess:
    """A server's process; what it says goes into a log.

    Args:
        arguments: of `vllm serve`, but for host and port, which are 127.0.0.1 and a free one.
        environment: variables beside those of the stage.
    Raises:
        SamplerError: the program is not there, or ends before it answers, or takes too long.
    """

    def __init__(self, server: VllmServer, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
        program = shutil.which(server.program)
        if program is None:
            raise SamplerError(
                f"runtime.yaml: vllm.program: {server.program} is not there, or cannot be run; name the vllm of an "
                "environment with vLLM, or the address of a server"
            )
        self.log = log
        port = free_port()
        command = [program, "serve", *arguments, "--host", "127.0.0.1", "--port", str(port), *server.options]
        own = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=own | environment,
                start_new_session=True,  # Ctrl-C is for the stage
                preexec_fn=end_after_parent if sys.platform == "linux" else None,
            )
        self.end = weakref.finalize(self, end_group, self.process)
        self.connection = VllmConnection(f"http://127.0.0.1:{port}", server, self.fate)
        self._wait(server.start_seconds)

    def _wait(self, seconds: float) -> None:
        late_at = time.monotonic() + seconds
        while not self.connection.is_there():
            if self.process.poll() is not None:
                raise SamplerError(f"vLLM server cannot be started{self.fate()}")
            if time.monotonic() > late_at:
                self.end()
                raise SamplerError(f"vLLM server does not answer within {seconds:g} s (see {self.log})")
            time.sleep(0.5)

    def fate(self) -> str:
        """What has become of it, for a message: "" as long as it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)  # connections break a little before the process ends
        status = self.process.poll()
        return "" if status is None else f"; its process has ended with {status} (see {self.log})"


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def end_after_parent() -> None:
    """Let the kernel end this process when the stage dies, however it dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_group(process: subprocess.Popen) -> None:
    """End a server with the processes that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)
            if number == signal.SIGKILL:
                return
