"""A reward model from elsewhere in the real stages: DistilBERT with two labels, a tokenizer of its own, no template."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.lib.command.jsonl import read_jsonl
from tests.given_reward_models import logits_of, save_classifier, save_tokenizer
from tests.stages.tiny_pipeline import call, change, refusal
from tests.tables import rollout_rows

Copy = Callable[..., Path]
GIVEN = {"reward_model": "data/raw/classifier", "reward_label": "POSITIVE"}
JUDGE = GIVEN | {"judge": GIVEN["reward_model"]}  # itself: no second one takes part


@pytest.fixture
def folder(copy_of_tiny: Copy) -> Path:
    project = copy_of_tiny()
    given, labels = project / "data/raw/classifier", {0: "NEGATIVE", 1: "POSITIVE"}
    save_classifier(given, "distilbert", labels=labels, max_position_embeddings=512)
    save_tokenizer(given, template=None, longest=512)
    return project


def scores_of_texts(folder: Path, texts: list[str], *, plain: bool = True) -> list[float]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "data/raw/classifier")
    logits = logits_of(folder / "data/raw/classifier")
    return [float(logits([tokenizer(text, add_special_tokens=plain).input_ids])[0, 1]) for text in texts]


def test_ppo_and_grpo_learn_from_it(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """And PPO's critic from the policy's own body."""
    changes = {"train_ppo": {"ppo": GIVEN | {"critic": {"path": "models/sft"}}}, "train_grpo": {"grpo": GIVEN}}
    change(folder / "params.yaml", changes)
    prompts = {row: rows["prompt"] for row, rows in enumerate(read_jsonl(folder / "data/prepared/train/prompts.jsonl"))}
    for stage in ("train_ppo@ppo", "train_grpo@grpo"):
        capsys.readouterr()
        call(folder, stage)
        said = [line for line in capsys.readouterr().out.splitlines() if "reward model" in line]
        assert said == [
            f"{stage}: reward model data/raw/classifier (distilbert): transformers' classifier, label POSITIVE, by its "
            "own forward pass; text is encoded with its own tokenizer, as plain text, since it has no chat template"
        ]
        name = stage.partition("@")[2]
        rows = rollout_rows(folder, name)
        texts = [
            "\n".join([*(m["content"] for m in prompts[row["row"]]), row["response"].replace("<|pad|>", "")])
            for row in rows[:8]
        ]
        assert [row["score"] for row in rows[:8]] == pytest.approx(scores_of_texts(folder, texts), abs=1e-4)
        card = (folder / f"models/{name}/README.md").read_text()
        assert "`data/raw/classifier`" in card
        assert '"reward_label": "POSITIVE"' in card


def test_a_template_of_its_own_gets_the_messages_and_tools_of_samples(folder: Path) -> None:
    """Also of prompts that are those of sft rows; and pairs whose replies call tools are told apart."""
    template = (
        "{{ tools[0].function.name }}{% for m in messages %}<s>{{ m.content }}{{ m.tool_calls or '' }}{% endfor %}"
    )
    given, name = folder / "data/raw/classifier", "data/samples/dpo.jsonl"
    save_tokenizer(given, template=template, longest=512)
    settings = {"evaluate_rm": {"rm": GIVEN}, "score_samples": JUDGE, "prepare_data": {"kinds": ["sft", "preference"]}}
    change(folder / "params.yaml", settings)
    (folder / "data/tokens/test/prompts.arrow").unlink()
    call(folder, "evaluate@dpo")
    prepared = list(read_jsonl(folder / "data/prepared/test/sft.jsonl"))
    samples = list(read_jsonl(folder / name))
    assert samples
    for sample in samples:
        turns = prepared[sample["row"]]["messages"]
        first_reply = [turn["role"] for turn in turns].index("assistant")
        assert sample["prompt"] == turns[:first_reply]
    tools = [{"type": "function", "function": {"name": "film"}}]
    path = folder / "data/prepared/test/preference.jsonl"
    pairs = list(read_jsonl(path))
    for pair in pairs:
        for side in ("chosen", "rejected"):
            called = {"type": "function", "function": {"name": side, "arguments": {}}}
            pair[side] = [{"role": "assistant", "content": "", "tool_calls": [called]}]
    path.unlink()
    path.write_text("".join(json.dumps({**pair, "tools": tools}) + "\n" for pair in pairs))
    (folder / name).unlink()
    (folder / name).write_text("".join(json.dumps({**sample, "tools": tools}) + "\n" for sample in samples))
    call(folder, "score_samples@dpo")
    texts = ["film" + "".join(f"<s>{turn['content']}" for turn in s["prompt"]) + f"<s>{s['response']}" for s in samples]
    scores = [row["score"] for row in read_jsonl(folder / "data/sample_scores/dpo.jsonl")]
    assert scores == pytest.approx(scores_of_texts(folder, texts, plain=False), abs=1e-4)

    call(folder, "evaluate_rm@rm")
    assert json.loads((folder / "metrics/evaluate_rm/rm.json").read_text())["margin_mean"] != 0


def test_it_judges_pairs_and_samples(folder: Path) -> None:
    change(folder / "params.yaml", {"evaluate_rm": {"rm": GIVEN}, "score_samples": JUDGE})
    call(folder, "evaluate_rm@rm")
    pairs = list(read_jsonl(folder / "data/prepared/test/preference.jsonl"))
    found = []
    for side in ("chosen", "rejected"):
        texts = ["\n".join(m["content"] for m in [*pair["prompt"], *pair[side]]) for pair in pairs]
        found.append(scores_of_texts(folder, texts))
    right = sum(good > bad for good, bad in zip(*found, strict=True)) / len(pairs)
    metrics = json.loads((folder / "metrics/evaluate_rm/rm.json").read_text())
    assert metrics["accuracy"] == pytest.approx(right)
    call(folder, "score_samples@dpo")
    scores = list(read_jsonl(folder / "data/sample_scores/dpo.jsonl"))
    assert all(isinstance(row["score"], float) for row in scores)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (1, "data/prepared/test/preference.jsonl has 1 rows, and the tokens are of more: run tokenize_data again"),
        (0, "data/prepared/test/preference.jsonl, line 1: 'chosen' is missing (the row has prompt)"),
    ],
)
def test_it_judges_no_pairs_but_those_of_the_tokens(
    folder: Path, capsys: pytest.CaptureFixture, rows: int, message: str
) -> None:
    change(folder / "params.yaml", {"evaluate_rm": {"rm": GIVEN}})
    prepared = folder / "data/prepared/test/preference.jsonl"
    first = prepared.read_text().splitlines()[:rows] or ['{"prompt": []}']
    prepared.unlink()
    prepared.write_text("\n".join(first) + "\n")
    assert message in refusal(folder, "evaluate_rm@rm", capsys)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("change_of", [{"response": None}, {"row": "x"}, {"reference_response_ids": [10**6]}])
def test_samples_that_evaluate_does_not_write_are_refused(
    folder: Path, capsys: pytest.CaptureFixture, given: bool, change_of: dict[str, object]
) -> None:
    if given:
        change(folder / "params.yaml", {"score_samples": JUDGE})
    path = folder / "data/samples/dpo.jsonl"
    first, second, *_ = list(read_jsonl(path))
    path.unlink()
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, second | change_of)))
    if given and "reference_response_ids" in change_of:
        call(folder, "score_samples@dpo")  # it reads the text
        return
    message = "data/samples/dpo.jsonl, line 2: not a sample of evaluate's; run evaluate@dpo again"
    assert message in refusal(folder, "score_samples@dpo", capsys)


def test_its_tokenizer_makes_it_no_critic(folder: Path, capsys: pytest.CaptureFixture) -> None:
    change(folder / "params.yaml", {"train_ppo": {"ppo": GIVEN | {"critic": {"path": GIVEN["reward_model"]}}}})
    message = refusal(folder, "train_ppo@ppo", capsys)
    assert "data/raw/classifier has another tokenizer than models/sft, and a critic judges each of the" in message
    assert (
        "let critic name models/sft (its body with a new head), or a reward model that was trained from it" in message
    )
