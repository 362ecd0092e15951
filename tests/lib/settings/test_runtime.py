"""runtime.yaml: defaults, overrides by script, nothing unknown."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.settings.runtime import STAGES, read_runtime, read_runtimes
from tests.real_files import PROJECT

TEXT = (PROJECT / "runtime.yaml").read_text()


def write(folder: Path, extra: str) -> Path:
    path = folder / "runtime.yaml"
    path.write_text(TEXT + extra)
    return path


def test_the_committed_file_is_read_for_every_stage() -> None:
    default = load_yaml(PROJECT / "runtime.yaml")["default"]
    for stage in STAGES:
        assert read_runtime(stage, PROJECT / "runtime.yaml").threads == default["threads"]


def test_a_stage_overrides_single_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "train_ppo:\n  micro_batch_tokens: 77\n")
    assert read_runtime("train_ppo", path).micro_batch_tokens == 77
    assert read_runtime("train_ppo", path).threads == read_runtime("train_rm", path).threads
    assert read_runtime("train_rm", path).micro_batch_tokens != 77


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("precompute_ref_logprobs: {}\n", "no stage is named 'precompute_ref_logprobs'; it is called ref_logprobs now"),
        ("evaluate_policy: {}\n", "no stage is named 'evaluate_policy'; it is called evaluate now"),
        ("train_pppo: {}\n", "no stage is named 'train_pppo'; did you mean 'train_ppo'?"),
        ("train_rm: {thread: 1}\n", "train_rm.thread is not a known key; did you mean 'threads'?"),
        ("train_rm: 3\n", "train_rm: expected keys, found 3 (int)"),
        ("train_rm: {threads: 0}\n", "threads must be at least 1 and at most 4096, found 0"),
        ("train_rm: {device: tpu}\n", "'tpu' (str) is not one of: auto, cpu, cuda"),
        ("train_rm: {device: cpu, activation_offload: true}\n", "activation_offload needs a GPU, and device is cpu"),
        (
            "train_rm: {packing: true, pad_to_multiple_of: 8}\n",
            "pad_to_multiple_of is of padded rows, and packing pads",
        ),
        ("train_rm: {kept_checkpoints: 0}\n", "kept_checkpoints must be at least 1, found 0"),
        ("train_rm: {shown_samples: -1}\n", "shown_samples must be at least 0, found -1"),
        ("train_rm: {checkpoint_seconds: -0.5}\n", "checkpoint_seconds must be at least 0, found -0.5"),
        ("train_rm: {log_seconds: -1}\n", "log_seconds must be at least 0, found -1"),
        ("train_rm: {deepspeed: {optimizer: {}}}\n", "deepspeed.optimizer is set by the pipeline"),
        (
            "train_rm: {deepspeed: {zero_optimization: {stage: 3}}}\n",
            "zero_optimization.stage: set zero_stage or frozen",
        ),
        (
            "train_rm: {deepspeed: {torch_autocast: {enabled: true}}}\n",
            "deepspeed.torch_autocast is set by the pipeline",
        ),
        (
            "train_rm: {deepspeed: {zero_optimization: {zero_quantized_weights: true}}}\n",
            "zero_optimization.zero_quantized_weights would change results beyond rounding",
        ),
        (
            "train_rm: {deepspeed: {zero_optimization: {offload_optimizer: {device: nvme}}}}\n",
            "zero_optimization.offload_optimizer: nvme is not supported; offload_optimizer and",
        ),
        ("train_rm: {deepspeed: {zero_optimization: 3}}\n", "deepspeed.zero_optimization must hold keys, found 3"),
        (
            "train_rm: {reward_servers: {a: {address: 'ftp://a', token_variable: null, timeout_seconds: 1.0, "
            "attempts: 1, backoff_seconds: 0.0, rows_per_request: 1, parallel_requests: 1}}}\n",
            "reward_servers.a: address must be such as http://127.0.0.1:5000/get_reward, found 'ftp://a'",
        ),
        (
            "train_rm: {reward_servers: {a: {address: 'http://me:secret@a', token_variable: null, timeout_seconds: "
            "1.0, attempts: 1, backoff_seconds: 0.0, rows_per_request: 1, parallel_requests: 1}}}\n",
            "reward_servers.a: address must hold no password: name an environment variable in token_variable",
        ),
        ("train_rm: {trackers: [wandbb]}\n", "trackers[0]: 'wandbb' (str) is not one of: tensorboard, wandb"),
        ("train_rm: {trackers: wandb}\n", "train_rm.trackers: expected a list, found 'wandb' (str)"),
        ("train_rm: {trackers: [wandb, wandb]}\n", "trackers must name each tracker once, found wandb, wandb"),
        ("train_rm: {tracker_run: a/b}\n", "tracker_run must be up to 100 letters, digits, spaces, dots, - and _"),
        ("train_rm: {tracker_project: a?}\n", "tracker_project must be up to 100 letters"),
        ("train_rm: {tracker_tags: [3]}\n", "tracker_tags[0]: expected text, found 3 (int)"),
        ("train_rm: {tracker_tags: ['']}\n", "tracker_tags[0]: expected a text of 1 to 4096 characters, found ''"),
        ("train_rm: {tracker_folder: models/sft/runs}\n", "tracker_folder must not lie in models/"),
        ("train_rm: {tracker_folder: runs/../metrics}\n", "tracker_folder must not lie in metrics/"),
        ("train_rm: {tracker_folder: .}\n", "tracker_folder must be a folder of its own, and '.' is the project"),
        (
            "train_rm: {tracker_folder: /etc}\n",
            "tracker_folder must lie in the project, and '/etc' does not; to keep it",
        ),
        ("train_rm: {tracker_folder: ../../x}\n", "tracker_folder must lie in the project, and '../../x' does not"),
        ("train_rm: {tracker_folder: .git}\n", "tracker_folder must not lie in .git/"),
        ("train_rm: {tracker_folder: x/../.dvc/cache}\n", "tracker_folder must not lie in .dvc/"),
        ("train_rm: {tracker_folder: .venv}\n", "tracker_folder must not lie in .venv/"),
        ("train_rm: {tracker_folder: .scratch/runs}\n", "tracker_folder must not lie in .scratch/"),
        ("train_rm: {tracker_folder: tests/runs}\n", "tracker_folder must not lie in tests/"),
        ("train_rm: {wandb_mode: off}\n", "'off' (str) is not one of: offline, online, disabled"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(StageError) as error:
        read_runtime("train_rm", write(tmp_path, extra))
    assert message in str(error.value)


def test_the_stages_are_those_that_the_launcher_starts() -> None:
    graph = load_yaml(PROJECT / "dvc.yaml")["stages"]
    assert list(STAGES) == [
        name for name, stage in graph.items() if stage.get("do", stage)["cmd"].startswith("sh stages/launch.sh ")
    ]


def test_every_stage_has_a_section_of_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, "".join(f"{stage}: {{threads: {number}}}\n" for number, stage in enumerate(STAGES, 5)))
    assert [read_runtime(stage, path).threads for stage in STAGES] == list(range(5, 5 + len(STAGES)))
    assert {stage: runtime.threads for stage, runtime in read_runtimes(path).items()} == dict(
        zip(STAGES, range(5, 5 + len(STAGES)), strict=True)
    )


def test_git_and_dvc_leave_the_folder_of_the_trackers_alone() -> None:
    folder = read_runtime("train_sft", PROJECT / "runtime.yaml").tracker_folder
    file = f"{folder}/tensorboard/run/events.out.tfevents.0000000001"
    for tool in ("git", f"{sys.executable} -m dvc"):
        assert subprocess.run([*tool.split(), "check-ignore", "--quiet", file], cwd=PROJECT).returncode == 0
