"""Serve a reward model over HTTP, by OpenRLHF's POST /get_reward.

    python -m stages.tools.serve_reward --model models/rm --port 5000

It listens on loopback unless --host says otherwise, which takes a token: each request must then bring the text of the
environment variable STAGEWISE_REWARD_TOKEN as `Authorization: Bearer …`. The `default` section of runtime.yaml says
how the model runs. A client finds the model's revision, a hash of its folder, in each reply; the first line says it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash
from stages.lib.command.params import read_value
from stages.lib.command.run import asks_for_help, run
from stages.lib.settings.runtime import read_runtime

if TYPE_CHECKING:
    from stages.lib.rl.rewards.served_model import ServedModel

if not asks_for_help():
    import uvicorn

    from stages.lib.compute.batching import micro_batching
    from stages.lib.compute.processes import join_processes
    from stages.lib.models.pretrained import Loading
    from stages.lib.rl.rewards.reward_model import load_reward_model
    from stages.lib.rl.rewards.reward_service import ServiceLimits, reward_service
    from stages.lib.rl.rewards.served_model import ServedModel

TOKEN_VARIABLE = "STAGEWISE_REWARD_TOKEN"


class OptionsOfReading(NamedTuple):
    """How the model is read, as `RewardReading` says it in params.yaml."""

    reward_head: str | None
    reward_label: str | int | None


def load_served(
    model: Path, tokenizer: Path, reading: OptionsOfReading, precision: str, *, standardise: bool
) -> ServedModel:
    """The model, loaded as a stage loads it whose policies have this tokenizer."""
    runtime, trusted = read_runtime("serve_reward"), read_value("trust_remote_code", bool)
    processes = join_processes(runtime)
    loading = Loading(precision, runtime, processes.device, frozen=True, trust_remote_code=trusted)
    batching = micro_batching(runtime, 0, processes)  # padding is masked, or the model's own where it is not
    reward = load_reward_model(model, reading, loading, batching, processes, tokenizer, standardise=standardise)
    if reward.facts and reward.facts.line():
        print(reward.facts.line(), flush=True)
    return ServedModel(reward, model, trust_remote_code=trusted)


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises StageError if there cannot be one."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise StageError(f"cannot listen at {host}:{port}: {reason}; give another --host or --port") from None


def required_token(host: str) -> str | None:
    """The token of the environment. Raises StageError if there is none, and others than this machine may ask."""
    token = os.environ.get(TOKEN_VARIABLE) or None
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if token is None and not is_loopback:
        raise StageError(
            f"--host {host} is not loopback, so other machines could ask: set the environment variable "
            f"{TOKEN_VARIABLE} to a secret text, which each request must bring"
        )
    return token


def main(
    model: Annotated[Path, typer.Option(help="Folder of the reward model.")] = Path("models/rm"),
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 5000,
    label: Annotated[str | None, typer.Option(help="Of a model with several labels: as reward_label.")] = None,
    head: Annotated[str | None, typer.Option(help="The layer that gives the score: as reward_head.")] = None,
    standardise: Annotated[bool, typer.Option("--standardise", help="As standardise_reward.")] = False,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    tokenizer: Annotated[Path, typer.Option(help="Folder of a model with the policies' tokenizer.")] = Path(
        "models/base"
    ),
    max_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 32 * 2**20,
    max_rows: Annotated[int, typer.Option(min=1, help="Of a request.")] = 4096,
    max_waiting: Annotated[int, typer.Option(min=1, help="Rows of all requests that wait.")] = 65536,
) -> None:
    """Serve the scores of a reward model."""
    if precision not in ("fp32", "bf16"):
        raise StageError(f"--precision {precision}: expected fp32 or bf16")
    token = required_token(host)
    place = listening(host, port)
    reading = OptionsOfReading(head, int(label) if label and label.isdecimal() else label)
    served = load_served(model, tokenizer, reading, precision, standardise=standardise)
    revision = dvc_hash(model)
    app = reward_service(served, revision, ServiceLimits(max_bytes, max_rows, max_waiting), token)
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {model} at http://{shown}:{place.getsockname()[1]}/get_reward, revision {revision}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run([place])


if __name__ == "__main__":
    run(main)
