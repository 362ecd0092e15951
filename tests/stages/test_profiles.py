"""Every profile, cut short, from its raw data to the report: real files and a real pretrained model, or from a Hub."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from stages.tools.use_profile import settings_of
from tests.hub_server import HubRepository, HubServer, repository_of_folder
from tests.loaded_python import loaded_python
from tests.pipeline.graph import all_instances, load_graph
from tests.real_files import PROJECT, real_file
from tests.stages.tiny_llama3 import save_llama3
from tests.stages.tiny_pipeline import call, inside, new_project, use_base, write_yaml
from tests.stages.tiny_qwen import save_qwen

pytestmark = pytest.mark.slow
ROWS, PROMPTS = 120, 8
RL = {"iterations": 2, "critic_warmup_iterations": 1, "minibatch_size": 4}
RL |= {"max_new_tokens": 16, "min_new_tokens": 16}  # where a profile has a least number
# What makes a run short, wherever a section has the key.
SHORT = {"max_rows": ROWS, "validation_fraction": 0.1, "test_fraction": 0.1, "epochs": 1, "batch_size": 16} | {
    "eval_every": 100,
    "max_prompts": PROMPTS,
    "bootstrap_resamples": 100,
}


CALLS = """
import sys
from pathlib import Path
from tests.stages.tiny_pipeline import call
for stage in sys.argv[1:]:
    call(Path.cwd(), stage)
"""


def shortened(settings: Any, section: str = "") -> Any:
    """The settings of a profile with everything in them that takes long made small."""
    if not isinstance(settings, dict):
        return deepcopy(settings)  # or YAML would write an alias where two entries share a default
    short = SHORT | (RL if section in ("train_ppo", "train_grpo") else {"max_new_tokens": 16, "min_new_tokens": 16})
    found = {name: shortened(value, section or name) for name, value in settings.items()}
    found |= {name: type(settings[name] or 0)(short[name]) for name in found.keys() & short.keys() if found[name] != 0}
    if "rollout_batch_size" in found:
        found["rollout_batch_size"] = 8 // found.get("samples_per_prompt", 1)
    return found


def made(
    folder: Path, profile: str, files: Callable[[Path], None], hub: dict[str, str] | None = None, **more: Any
) -> Path:
    """A project in which every stage of a profile has run; `more` are settings of tokenize_data.

    Args:
        hub: the environment in which a process reaches the Hub.
    """
    project = new_project(folder)
    (project / "data/raw").mkdir(parents=True)
    (project / "models").mkdir()
    files(project)
    settings = shortened(settings_of(PROJECT / f"profiles/{profile}.yaml"))
    settings["tokenize_data"] |= {"max_length": 256, "max_prompt_length": 160, **more}
    write_yaml(project / "params.yaml", settings)
    stages = all_instances(load_graph(), settings)
    fetched = [stage for stage in stages if "_hub@" in stage or stage.startswith("fetch_model")]
    if hub is not None:  # which is read where the Hub's library is imported: all that is fetched, in one process
        environment = {**hub, "PYTHONPATH": str(PROJECT)}
        words = [*loaded_python(environment), "-c", CALLS, *fetched]
        ended = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    for stage in stages:
        if stage not in fetched:
            call(project, stage)
    return project


def metrics(folder: Path, name: str) -> dict[str, float]:
    return json.loads((folder / f"metrics/{name}.json").read_text())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def link(project: Path, name: str, shared: str) -> None:
    """Put a shared file or folder where a profile expects a folder of data, or a model."""
    source = real_file(shared)
    target = project / name
    if source.is_file():
        target.mkdir(parents=True)
        target /= source.name
    target.symlink_to(source)


def instruct(project: Path) -> None:
    """A model that has a chat template of its own: the pretrained Llama, as prepare_base leaves it."""
    link(project, "models/pretrained", "models/stories260K")
    (project / "side").mkdir()
    side = new_project(project / "side")
    markers = ["<|system|>", "<|user|>", "<|assistant|>"]
    use_base(
        side,
        "files",
        path=str(project / "models/pretrained"),
        chat_template="chat.jinja",
        special_tokens=markers,
    )
    call(side, "prepare_base_files@base")
    (side / "models/base").rename(project / "models/instruct")


def reward_model(project: Path) -> None:
    """A classifier from elsewhere, with another tokenizer, another head and random weights."""
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(real_file("tokenizers/gpt2"))
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=512, num_labels=1, pad_token_id=50256)
    GPT2ForSequenceClassification(config).save_pretrained(project / "models/reward")
    tokenizer.save_pretrained(project / "models/reward")


# HH transcripts through everything.


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def files(project: Path) -> None:
        link(project, "models/pretrained", "models/stories260K")
        link(project, "data/raw/hh-rlhf", "data/hh-rlhf")

    return made(tmp_path_factory.mktemp("hh"), "hh-local", files)


def test_every_row_is_kept_or_counted(transcripts: Path) -> None:
    read, counts = metrics(transcripts, "read_source/hh"), metrics(transcripts, "prepare_data")
    dropped = sum(value for name, value in read.items() if name.startswith("dropped/"))
    assert read["rows_kept"] + dropped == read["rows_read"] == ROWS
    assert read["rows_kept"] == read["preference/rows"] == read["sft/rows"]
    kept = sum(counts[f"preference/{split}_rows"] for split in ("train", "validation", "test"))
    left_out = sum(value for name, value in counts.items() if name.startswith("hh/preference/dropped/"))
    assert kept + left_out == read["preference/rows"]


def test_no_prompt_is_in_two_splits(transcripts: Path) -> None:
    prompts = {
        split: {
            json.dumps(row["prompt"])
            for kind in ("preference", "prompts")
            for row in rows(transcripts / f"data/prepared/{split}/{kind}.jsonl")
        }
        for split in ("train", "validation", "test")
    }
    assert all(prompts.values())
    assert len(set.union(*prompts.values())) == sum(map(len, prompts.values()))


def test_fine_tuning_lowers_the_held_out_loss(transcripts: Path) -> None:
    results = metrics(transcripts, "training/sft")
    assert results["validation_loss"] < results["validation_loss_before"]


def test_without_a_gold_utility_the_evaluation_is_by_reward(transcripts: Path) -> None:
    assert not [name for name in metrics(transcripts, "evaluate/ppo") if name.startswith("gold")]
    scores = metrics(transcripts, "score_samples/ppo")
    difference = [scores[f"reward_minus_reference_{part}"] for part in ("ci_low", "mean", "ci_high")]
    assert difference == sorted(difference)
    assert "gold" not in rows(transcripts / "data/samples/ppo.jsonl")[0]
    assert (transcripts / "metrics/report.html").read_text().count("<table") >= 1


# Profiles to copy.


def test_instructions_alone_give_an_sft_model_its_evaluation_and_a_report(tmp_path: Path) -> None:
    def files(project: Path) -> None:
        link(project, "models/pretrained", "models/stories260K")
        link(project, "data/raw/instructions", "data/demo/alpaca_en_demo.json")

    project = made(tmp_path, "sft-only", files)
    assert sorted(path.name for path in (project / "models").iterdir()) == ["base", "pretrained", "sft"]
    assert sorted(path.name for path in (project / "data/prepared/train").iterdir()) == ["sft.jsonl"]
    base, sft = metrics(project, "evaluate/base"), metrics(project, "evaluate/sft")
    assert sft["sft_perplexity"] < base["sft_perplexity"]
    assert rows(project / "data/samples/sft.jsonl")
    report = (project / "metrics/report.html").read_text()
    assert "sft" in report
    assert "ppo" not in report


def test_dpo_from_a_model_that_follows_instructions(tmp_path: Path) -> None:
    def files(project: Path) -> None:
        instruct(project)
        link(project, "data/raw/pairs", "data/demo/dpo_en_demo.json")

    project = made(tmp_path, "dpo-from-instruct", files, truncation="keep_end", cut_replies=True)
    assert {"base", "dpo", "instruct"} <= {path.name for path in (project / "models").iterdir()}
    assert not (project / "models/sft").exists()
    dpo = metrics(project, "training/dpo")
    assert dpo["validation_rewards_margins"] != 0
    assert metrics(project, "evaluate/dpo")["kl_to_reference_mean"] != 0
    assert (project / "metrics/report.html").is_file()


def test_rl_with_a_reward_model_that_was_brought(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def files(project: Path) -> None:
        instruct(project)
        reward_model(project)
        questions = rows(real_file("data/gsm8k") / "test.jsonl")[:ROWS]
        lines = [json.dumps({"prompt": question["question"]}) + "\n" for question in questions]
        (project / "data/raw/prompts").mkdir()
        (project / "data/raw/prompts/questions.jsonl").write_text("".join(lines))

    project = made(tmp_path, "own-reward-model", files, truncation="keep_end")
    said = capsys.readouterr()
    assert "text is encoded with its own tokenizer, as plain text, since it has no chat template" in said.out + said.err
    for policy in ("ppo", "grpo"):
        assert metrics(project, f"training/{policy}")["iterations"] == 2
        assert metrics(project, f"score_samples/{policy}")["prompts"] == PROMPTS
    card = (project / "models/ppo/README.md").read_text()
    assert "models/reward" in card
    with inside(project):
        assert (project / "metrics/report.html").is_file()


# Profiles of the Hub, from a server on loopback with small data and tiny models behind the names.

HH = ("Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa")
QWEN = {
    "Qwen/Qwen2.5-0.5B": "060db6499f32faf8b98477b0a26969ef7d8b9987",
    "Qwen/Qwen2-1.5B": "8a16abf2848eda07cc5253dec660bf1ce007ad7a",
    "Qwen/Qwen2.5-1.5B-Instruct": "989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
}
LLAMA = ("meta-llama/Llama-3.1-8B-Instruct", "0e9e39f249a16976918f6564b8830bc894c89659")
ULTRAFEEDBACK = ("HuggingFaceH4/ultrafeedback_binarized", "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85")
OPT = ("facebook/opt-350m", "08ab08cc4b72ff5593870b5d527cf4230323703c")


def transcript(number: int) -> dict[str, Any]:
    asked = f"\n\nHuman: question {number}?\n\nAssistant:"
    return {"chosen": f"{asked} good {number}", "rejected": f"{asked} bad {number}"}


def conversation(number: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"question {number}?"}
    replies = {"chosen": f"good {number}", "rejected": f"bad {number}"}
    return {name: [asked, {"role": "assistant", "content": reply}] for name, reply in replies.items()}


def feedback(number: int) -> dict[str, Any]:
    """As UltraFeedback's rows, some of which have the same score twice."""
    pair, scores = conversation(number), {"score_chosen": 8.0, "score_rejected": 8.0 - number % 3}
    return {"prompt": f"question {number}?", "prompt_id": f"{number}", **pair, "messages": pair["chosen"], **scores}


def instruction(number: int) -> dict[str, Any]:
    return {"instruction": f"question {number}?", "input": "", "output": f"good {number}"}


def json_lines(row: Callable[[int], dict[str, Any]], *numbers: int) -> bytes:
    return "".join(json.dumps(row(number)) + "\n" for number in range(*numbers)).encode()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    from transformers import OPTConfig, OPTForCausalLM

    qwen, instruct, opt, llama = (tmp_path_factory.mktemp(name) for name in ("qwen", "instruct", "opt", "llama"))
    save_qwen(qwen, positions=512)
    save_llama3(llama, positions=512)
    for folder in (instruct, opt):
        shutil.copytree(qwen, folder, dirs_exist_ok=True)
    tokenizer = json.loads((qwen / "tokenizer_config.json").read_text())
    (instruct / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": "<|im_end|>"}))
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=320, num_attention_heads=2, max_position_embeddings=512, **sizes)
    OPTForCausalLM(config).save_pretrained(opt)
    folder = "harmless-base"
    hh = {f"{folder}/train.jsonl": json_lines(transcript, 40), f"{folder}/test.jsonl": json_lines(transcript, 40, 60)}
    splits = {"train_prefs": (0, 60), "test_prefs": (60, 80), "train_sft": (80, 90)}
    pairs = {f"data/{name}-00000-of-00001.jsonl": json_lines(feedback, *rows) for name, rows in splits.items()}
    data = [
        HubRepository("datasets", *ULTRAFEEDBACK, pairs),
        HubRepository("datasets", *HH, hh),
        HubRepository("datasets", "QingyiSi/Alpaca-CoT", "0" * 40, {"firefly/a.jsonl": json_lines(instruction, 60)}),
        HubRepository(
            "datasets",
            "OpenRLHF/preference_dataset_mixture2_and_safe_pku",
            "0" * 40,
            {"data/train.jsonl": json_lines(conversation, 60)},
        ),
    ]
    models = [
        repository_of_folder("models", name, commit, instruct if name.endswith("Instruct") else qwen)
        for name, commit in QWEN.items()
    ]
    with HubServer(
        [*data, *models, repository_of_folder("models", *OPT, opt), repository_of_folder("models", *LLAMA, llama)]
    ) as server:
        yield server


@pytest.mark.parametrize(
    ("profile", "trained", "dtype"),
    [
        ("qwen2.5-0.5b-hh", {"sft", "rm", "dpo", "ppo", "grpo"}, torch.bfloat16),
        ("qwen2-1.5b-firefly-sft", {"sft"}, torch.bfloat16),
        ("qwen2.5-1.5b-rm", {"rm"}, torch.bfloat16),
        ("opt-350m-hh-rm", {"rm"}, torch.float32),
        ("llama-3.1-8b-ultrafeedback-dpo", {"dpo"}, torch.bfloat16),
    ],
)
def test_a_profile_goes_from_the_hub_to_the_report(
    hub: HubServer, tmp_path: Path, profile: str, trained: set[str], dtype: torch.dtype
) -> None:
    """With its own names, revisions and precisions, and a smaller model behind the name."""
    project = made(tmp_path, profile, lambda _: None, hub.environment(tmp_path / "cache"))
    assert {path.name for path in (project / "models").iterdir()} == {"base", *trained}
    for name in trained:
        tensors = load_file(project / f"models/{name}/model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    if "dpo" in trained:
        first = pd.read_csv(project / "metrics/curves/dpo.csv").iloc[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if profile == "llama-3.1-8b-ultrafeedback-dpo":
        assert metrics(project, "prepare_data")["ultrafeedback_test/preference/test_rows"] == 20
        assert (project / "models/dpo/adapter/adapter_config.json").is_file()
    if profile == "opt-350m-hh-rm":
        counts = metrics(project, "prepare_data")
        assert (counts["hh/preference/train_rows"], counts["hh_test/preference/test_rows"]) == (36, 20)
    assert (project / "metrics/report.html").is_file()
