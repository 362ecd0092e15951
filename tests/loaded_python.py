"""Python that has loaded the heavy libraries: a stage's imports cost five times what its work at these sizes does.

`loaded_python()` are the words of a command that stand for `python`, with `-m MODULE`, `-c CODE` or a file behind them.
What they start hands its arguments, folder, environment and standard streams to a server of this session, which forks a
child for it; it then passes signals on, and ends as the child does. A server has loaded no module of the project, so
those are imported as ever.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

LIBRARIES = (
    *("torch._dynamo", "torch.profiler._cupti_monitor", "pandas", "pyarrow.dataset", "pyarrow.parquet", "pydantic"),
    *("ruamel.yaml", "scipy.optimize", "sympy", "typer", "jinja2.sandbox", "matplotlib.backends.backend_svg"),
    *("multiprocess", "aiohttp", "fsspec", "httpx", "tqdm.auto"),
)
# These read variables of the environment when they are loaded: where the Hub is, and whether there is a network.
LIBRARIES_OF_THE_HUB = (
    *("datasets", "deepspeed", "accelerate", "transformers.modeling_utils", "transformers.generation"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "transformers.convert_slow_tokenizer"),
)
CLIENT = Path(__file__).with_name("loaded_python_client.py")
KERNELS = ("ATEN_", "ONEDNN_", "MKL_")  # what torch has read of them stays (stages/lib/command/kernels.py)
READ_ON_LOADING = ("HF_", "HUGGING", "TRANSFORMERS_")


def loaded_python(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The words that start Python with its libraries loaded.

    Args:
        environment: what it is to start in. If it has other variables that libraries read as they are loaded, those
            libraries will not have been.
    """
    server = _server()
    address = server.folder / ("hub" if read_on_loading(environment) == server.read else "any")
    return [sys.executable, "-I", "-S", str(CLIENT), str(address)]


def read_on_loading(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_ON_LOADING)}


def torchrun(environment: Mapping[str, str] = os.environ) -> str:
    """The words that start a module on two processes, all of which have their libraries loaded."""
    python = loaded_python(environment)
    launcher = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    return " ".join([*launcher, *python, "-m"])


class Server(NamedTuple):
    """The process whose forks are Python with its libraries loaded, the folder of its sockets, and what it has read."""

    process: subprocess.Popen
    folder: Path
    read: dict[str, str]


@functools.cache
def _server() -> Server:
    """Starts it, once a session."""
    folder = Path(tempfile.mkdtemp(prefix="loaded-python-"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, __file__, folder],
        env={**environment, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,  # closes with this process
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() + process.stdout.readline() == "ready\nready\n"
    return Server(process, folder, read_on_loading(environment))


def stop() -> None:
    """End the server, if one was started."""
    if _server.cache_info().currsize:
        server = _server()
        server.process.communicate()
        shutil.rmtree(server.folder)


def serve(folder: Path) -> tuple[list[str], str, dict[str, str]]:
    """Answer at two sockets until the input closes. Returns a child's words, folder and environment, in the child."""
    for name in LIBRARIES:
        importlib.import_module(name)
    other = os.fork()
    if other:
        return answer(folder / "any", other)
    for name in LIBRARIES_OF_THE_HUB:
        importlib.import_module(name)
    return answer(folder / "hub")


def answer(address: Path, other: int | None = None) -> tuple[list[str], str, dict[str, str]]:
    """Fork a child for each request until the input closes, and with it the server `other`."""
    gc.collect()
    gc.freeze()  # or the first collection in a child would copy all pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(address))
    listener.listen(64)
    print("ready", flush=True)
    events = selectors.DefaultSelector()
    events.register(0, selectors.EVENT_READ)
    events.register(listener, selectors.EVENT_READ)
    while True:
        # Those that have ended or lost their client come before new ones, which may need what they hold.
        for key, _ in sorted(events.select(), key=lambda event: event[0].data is None):
            if key.fd == 0:
                if other:
                    os.waitpid(other, 0)
                os._exit(0)
            elif key.data is None:
                request = forked(listener.accept()[0], events)
                if request:
                    return request
            elif key.fd in events.get_map():
                end(*key.data, events)


def forked(connection: socket.socket, events: selectors.BaseSelector) -> tuple[list[str], str, dict[str, str]] | None:
    """Fork a child, in which its request is returned, with its standard streams in their places."""
    request, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
    child = os.fork()
    if child == 0:
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
        for descriptor in {*streams, connection.detach(), *events.get_map()} - {0}:
            os.close(descriptor)
        events.close()
        return json.loads(request)
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{child}".encode())
    process = os.pidfd_open(child)
    for each in (process, connection):
        events.register(each, selectors.EVENT_READ, (child, process, connection))
    return None


def end(child: int, process: int, connection: socket.socket, events: selectors.BaseSelector) -> None:
    """A child has ended, or its client, with which it ends."""
    done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}".encode())
    for each in (process, connection):
        events.unregister(each)
    os.close(process)
    connection.close()


def be_python(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """The child: run a module, code or file as `python` would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    kernels = {name: value for name, value in os.environ.items() if name.startswith(KERNELS)}
    os.environ.clear()
    os.environ.update(environment | kernels)
    what, *sys.argv = words
    name = sys.argv[0] if what in ("-m", "-c") else what
    first = {"-m": folder, "-c": ""}.get(what, str(Path(what).absolute().parent))
    sys.path[:1] = [first, *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    if what == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv[0] = "-c"
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(name, "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv.insert(0, what)
        runpy.run_path(name, run_name="__main__")


def run(words: list[str], folder: str, environment: dict[str, str]) -> NoReturn:
    """Be Python to its end, but for taking down the modules one by one, which takes a second."""
    status: object = 0
    try:
        be_python(words, folder, environment)
    except SystemExit as ended:
        status = ended.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    run(*serve(Path(sys.argv[1])))
