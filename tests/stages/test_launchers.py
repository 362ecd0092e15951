"""Several machines: one stage under every launcher, shares that do not come out even, and a process that dies.

The machines are processes of this one that meet on loopback. srun, scontrol and pdsh are stand-ins that start processes
as the real ones do; the launchers, the scripts and the stages are real.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from stages.lib.data.token_tables import PREFERENCE_SCHEMA, SFT_SCHEMA
from tests.loaded_python import loaded_python, torchrun
from tests.stages.test_training import distance, outs_of
from tests.stages.tiny_pipeline import PROJECT, call, change, contents, script, stage_options
from tests.tables import rewrite

Copy = Callable[..., Path]
BIN = Path(sys.executable).parent
TIMEOUT = 600  # seconds: what hangs fails, what a busy machine makes slow does not
TWO_HERE = "torchrun --standalone --nproc_per_node=2 -m"

SRUN = f"""#!{sys.executable}
import os, subprocess, sys, time
words = sys.argv[1:]
assert words.pop(0) == "--kill-on-bad-exit=1"
tasks = []
for rank in range(2):
    slurm = dict(JOB_ID=4711, STEP_ID=2, STEP_NUM_TASKS=2, NTASKS=2, STEP_TASKS_PER_NODE="1(x2)")
    slurm |= dict(STEP_NODELIST="loop[1-2]", PROCID=rank, NODEID=rank, LOCALID=0)
    environment = os.environ | {{f"SLURM_{{name}}": str(value) for name, value in slurm.items()}}
    tasks.append(subprocess.Popen(words, env=environment))
while any(task.poll() is None for task in tasks) and not any(task.poll() for task in tasks):
    time.sleep(0.1)
for task in tasks:
    task.kill()
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames loop[1-2]" ] && printf '127.0.0.1\\n127.0.0.2\\n'
"""
PDSH = f"""#!{sys.executable}
import subprocess, sys
words = sys.argv[1:]
assert words[:5] == ["-S", "-f", "1024", "-w", "node-a,node-b"], words
command = " ".join(words[5:])
machines = [subprocess.Popen(["sh", "-c", command.replace("%n", str(number))]) for number in range(2)]
sys.exit(max(machine.wait() for machine in machines))
"""


def launch(folder: Path, stage: str, launcher: str, **variables: str) -> subprocess.Popen:
    """Start a stage as DVC does, with LAUNCH set."""
    # A machine of its own would have all threads to itself; with one each, the bytes can be compared.
    change(folder / "runtime.yaml", {"default": {"threads": 1, "checkpoint_seconds": 0.0}})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"LAUNCH": launcher, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT)}
    environment |= {"TORCH_EXTENSIONS_DIR": str(folder.parent / "compiled")}
    environment |= {"STAGEWISE_SCRATCH": str(folder / ".scratch"), **variables}
    return subprocess.Popen(
        ["sh", "stages/launch.sh", script(stage), *stage_options(stage)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> str:
    """What a stage that must succeed prints."""
    output, errors = output_of(process)
    assert process.returncode == 0, output + errors
    return output


def output_of(process: subprocess.Popen) -> tuple[str, str]:
    """Standard output and errors of a launch, which is stopped if it hangs."""
    try:
        return process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
        raise


def first_row_alone(path: Path, schema: object) -> None:
    rewrite(path, schema, lambda columns: {name: values[:1] for name, values in columns.items()})


@pytest.fixture
def uneven(copy_of_tiny: Copy) -> Callable[[str], Path]:
    """Makes projects whose last step and held-out table have one row, fewer than there are processes."""

    def copy(name: str) -> Path:
        folder = copy_of_tiny(name)
        change(folder / "params.yaml", {"train_sft": {"sft": {"epochs": 1.0, "batch_size": 9}}})
        first_row_alone(folder / "data/tokens/validation/sft.arrow", SFT_SCHEMA)
        return folder

    return copy


@pytest.fixture(scope="module")
def two_processes() -> dict[str, bytes]:
    """What two processes of one torchrun make of an uneven project; filled by the first test that comes."""
    return {}


@pytest.fixture
def expected(two_processes: dict[str, bytes], uneven: Callable[[str], Path]) -> dict[str, bytes]:
    if not two_processes:
        folder = uneven("two")
        end(launch(folder, "train_sft", torchrun()))
        two_processes |= outs_of(folder, "train_sft")
        alone = uneven("alone")
        call(alone, "train_sft")
        models = [load_file(path / "models/sft/model.safetensors") for path in (folder, alone)]
        assert distance(*models) < 1e-5
        losses = [
            json.loads((path / "metrics/training/sft.json").read_text())["validation_loss"] for path in (folder, alone)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    return two_processes


@pytest.mark.slow
def test_two_machines_under_torchrun(uneven: Callable[[str], Path], expected: dict[str, bytes]) -> None:
    first, second = uneven("first"), uneven("second")
    before = contents(second)
    meeting = "--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:29417 --rdzv-id=test"
    python = " ".join(loaded_python())
    machines = [
        launch(
            folder,
            "train_sft",
            f"torchrun --nnodes=2 --nproc_per_node=1 {meeting} --local-addr={address} --no-python {python} -m",
        )
        for folder, address in ((first, "127.0.0.1"), (second, "127.0.0.2"))
    ]
    before["runtime.yaml"] = (second / "runtime.yaml").read_bytes()  # `launch` has set it
    for machine in machines:
        end(machine)
    assert outs_of(first, "train_sft") == expected
    assert contents(second) == before  # a machine without the main process writes nothing
    # Nor is anything compiled, which would need a compiler, and leave a lock behind when it is killed.
    assert not (first.parent / "compiled").exists()


@pytest.mark.slow
def test_a_hostfile_under_deepspeed(uneven: Callable[[str], Path], expected: dict[str, bytes], tmp_path: Path) -> None:
    folder = uneven("hosts")
    (folder / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    programs = write_programs(tmp_path / "bin", pdsh=PDSH)
    launcher = "deepspeed --hostfile hostfile --no_ssh_check --master_addr 127.0.0.1 --master_port 29418"
    end(launch(folder, "train_sft", f"{launcher} --no_local_rank --module", PATH=programs))
    assert outs_of(folder, "train_sft") == expected


@pytest.mark.slow
def test_a_process_that_dies_ends_the_stage_which_goes_on_under_slurm(
    uneven: Callable[[str], Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = uneven("killed")
    process = launch(folder, "train_sft", TWO_HERE)
    deadline = time.monotonic() + TIMEOUT
    while not list(folder.glob(".scratch/*/code-*/checkpoint-????????/manifest.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = {one.environ().get("RANK"): one for one in psutil.Process(process.pid).children(recursive=True)}
    ranks["1"].kill()
    killed = time.monotonic()
    _, errors = output_of(process)
    assert process.returncode != 0
    assert time.monotonic() - killed < 30
    cause = errors.split("Root Cause")[1]
    assert "rank      : 1 " in cause
    assert "Signal 9 (SIGKILL)" in cause
    assert errors.count("lost contact") <= 1
    assert "[rank0]" not in errors

    programs = write_programs(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL)
    output = end(launch(folder, "train_sft", "srun --kill-on-bad-exit=1 sh stages/slurm_rank.sh", PATH=programs))
    assert "resuming from step" in output
    assert outs_of(folder, "train_sft") == expected


@pytest.mark.slow
def test_two_processes_evaluate_one_prompt_and_one_pair(copy_of_tiny: Copy) -> None:
    results = []
    for name in ("alone", "two"):
        folder = copy_of_tiny(name)
        change(folder / "params.yaml", {"evaluate": {"max_prompts": 1}})
        first_row_alone(folder / "data/tokens/test/preference.arrow", PREFERENCE_SCHEMA)
        if name == "alone":
            call(folder, "evaluate@ppo")
        else:
            end(launch(folder, "evaluate@ppo", torchrun()))
        results.append(json.loads((folder / "metrics/evaluate/ppo.json").read_text()))
    assert results[0]["prompts"] == results[0]["preference_pairs"] == 1
    assert results[1] == pytest.approx(results[0], rel=1e-4, abs=1e-5)


def write_programs(folder: Path, **programs: str) -> str:
    """Put programs into a folder. Returns the PATH on which they come first."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{BIN}:{os.environ['PATH']}"


RANK_WORDS = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"


@pytest.mark.parametrize(
    ("node", "task", "local", "own_tasks"), [(0, 1, 1, 2), (1, 2, 0, 2), (2, 5, 1, 3)], ids=["first", "second", "third"]
)
def test_a_slurm_task_finds_its_place(tmp_path: Path, node: int, task: int, local: int, own_tasks: int) -> None:
    echo = f'#!/bin/sh\nfor name in {RANK_WORDS}; do eval echo \\$$name; done\necho "$@"\n'
    programs = write_programs(tmp_path / "bin", python=echo, scontrol=SCONTROL)
    slurm = {"JOB_ID": 4711, "STEP_ID": 2, "STEP_NUM_TASKS": 7, "STEP_TASKS_PER_NODE": "2(x2),3"}
    slurm |= {"STEP_NODELIST": "loop[1-2]", "PROCID": task, "NODEID": node, "LOCALID": local}
    ended = subprocess.run(
        ["sh", "stages/slurm_rank.sh", "stages.train_sft", "--out", "a b"],
        cwd=PROJECT,
        env={"PATH": programs, **{f"SLURM_{name}": str(value) for name, value in slurm.items()}},
        capture_output=True,
        text=True,
        check=True,
    )
    port = 15000 + (4711 * 16 + 2) % 15000
    words = [str(task), str(local), "7", str(own_tasks), "127.0.0.1", str(port), "-m stages.train_sft --out a b"]
    assert ended.stdout.splitlines() == words


def test_a_slurm_task_without_slurm_is_refused() -> None:
    ended = subprocess.run(["sh", "stages/slurm_rank.sh"], cwd=PROJECT, env={}, capture_output=True, check=False)
    assert ended.returncode != 0
    assert b"SLURM_PROCID" in ended.stderr


def join(folder: Path, stage: str, launcher: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "stages.tools.join_stage", "--stage", stage],
        cwd=folder,
        env={**os.environ, "LAUNCH": launcher},
        capture_output=True,
        text=True,
        check=False,
    )


def test_another_machine_takes_part_with_the_command_of_the_first() -> None:
    ended = join(PROJECT, "evaluate@ppo", "echo started")
    options = stage_options("evaluate")
    command = shlex.join(["sh", "stages/launch.sh", "evaluate", *options])
    started = " ".join(["started stages.evaluate", *options])
    assert ended.stdout.splitlines() == [f"evaluate@ppo > {command}", started]


def test_another_machine_is_told_which_entry_it_runs() -> None:
    ended = join(PROJECT, "train_dpo", "sh -c 'echo $DVC_STAGE'")
    assert ended.stdout.splitlines()[0].startswith("train_dpo@dpo > sh stages/launch.sh train_dpo ")


@pytest.mark.parametrize(
    ("stage", "launcher", "message"),
    [
        ("train_sft", TWO_HERE, "this machine would run the stage by itself"),
        ("train_sft", "", "this machine would run the stage by itself"),
        ("evaluate", "echo", "name one of evaluate@sft, evaluate@dpo, evaluate@ppo, evaluate@grpo"),
        ("report", "echo", "report runs as one process"),
        ("train_stf", "echo", "'train_stf' not found"),
    ],
)
def test_a_stage_that_cannot_be_joined_is_refused(stage: str, launcher: str, message: str) -> None:
    ended = join(PROJECT, stage, launcher)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
