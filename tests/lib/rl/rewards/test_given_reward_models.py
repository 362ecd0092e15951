"""Reward models from elsewhere score as transformers' own forward pass does, whatever their head and tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.lib.command.errors import StageError
from stages.lib.data.chat import Context
from stages.lib.data.prompts import Prompt
from stages.lib.data.reward_texts import RewardTexts
from stages.lib.models.pretrained import Loading
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.reward_model import RewardModel, load_reward_model
from stages.lib.settings.reward_reading import RewardReading
from stages.lib.settings.runtime import read_runtime
from tests.given_reward_models import (
    CONFIGS,
    END_ID,
    TEMPLATE,
    logits_of,
    save_classifier,
    save_tokenizer,
    save_value_head,
    value_of,
)
from tests.real_files import PROJECT
from tests.tiny_models import CPU, batching, tiny_llama

RUNTIME = read_runtime("train_ppo", PROJECT / "runtime.yaml")
LOADING = Loading("fp32", RUNTIME, CPU)
PROMPTS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "what do you think of it?"}],
    [{"role": "system", "content": "You like films."}, {"role": "user", "content": "a film"}],
    [{"role": "user", "content": "good?"}],
]
REPLIES = ["a good film, and it is long", "bad", "I think that a film of it is what you do, or not."]
NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A folder with another tokenizer, which is all that is read of it."""
    folder = tmp_path / "policy"
    save_tokenizer(folder, template="{% for message in messages %}{{ message.content }}{% endfor %}")
    return folder


def loaded(
    folder: Path,
    policy: Path,
    head: str | None = None,
    label: str | int | None = None,
    tokens: int = 1000,
    *,
    standardise: bool = False,
) -> RewardModel:
    reading, processes = RewardReading(reward_head=head, reward_label=label), batching(1).processes
    return load_reward_model(folder, reading, LOADING, batching(tokens), processes, policy, standardise=standardise)


def rendered(folder: Path) -> list[list[int]]:
    """The conversations as transformers encodes them with the folder's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    both = [[*p, {"role": "assistant", "content": r}] for p, r in zip(PROMPTS, REPLIES, strict=True)]
    return [tokenizer.apply_chat_template(one, return_dict=False) for one in both]


@pytest.mark.parametrize("tokens", [1, 60, 1000])
@pytest.mark.parametrize("kind", [*CONFIGS])
def test_a_classifier_with_its_own_tokenizer(kind: str, tokens: int, tmp_path: Path, policy: Path) -> None:
    folder = tmp_path / "given"
    save_classifier(folder, kind)
    save_tokenizer(folder)
    scores = loaded(folder, policy, tokens=tokens).score_texts(PROMPTS, REPLIES)
    alone = [float(logits_of(folder)([ids])) for ids in rendered(folder)]
    assert scores == pytest.approx(alone, abs=1e-5)
    assert scores == pytest.approx(logits_of(folder)(rendered(folder))[:, 0].tolist(), abs=1e-5)
    assert len({*alone}) == 3


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_a_label_by_name_or_number(kind: str, tmp_path: Path, policy: Path) -> None:
    folder = tmp_path / "given"
    save_classifier(folder, kind, labels={0: "negative", 1: "neutral", 2: "positive"})
    save_tokenizer(folder)
    wanted = [float(logits_of(folder)([ids])[0, 2]) for ids in rendered(folder)]
    for label in ("positive", 2):
        model = loaded(folder, policy, label=label)
        assert model.score_texts(PROMPTS, REPLIES) == pytest.approx(wanted, abs=1e-5)
        assert model.facts
        assert model.facts.label == "positive"
    with pytest.raises(StageError, match=r"given has 3 labels; name .* in reward_label: negative, neutral, positive$"):
        loaded(folder, policy)
    with pytest.raises(
        StageError,
        match=r"has no label 'positve', which .* \(it has negative, neutral, positive\); did you mean 'positive'\?",
    ):
        loaded(folder, policy, label="positve")
    with pytest.raises(StageError, match="reward_label is 3, and its last label has the number 2"):
        loaded(folder, policy, label=3)


def test_an_end_that_is_also_padding_is_passed_over_as_transformers_does(tmp_path: Path, policy: Path) -> None:
    """Whose pad id is its EOS is read before that, by transformers' rule; and one without a pad id at the EOS."""
    texts = {}
    for name, pad_id in (("eos", END_ID), ("none", None)):
        folder = tmp_path / name
        save_classifier(folder, "llama", pad_token_id=pad_id)
        save_tokenizer(folder)
        texts[name] = loaded(folder, policy).score_texts(PROMPTS, REPLIES)
        assert texts[name] == pytest.approx([float(logits_of(folder)([ids])) for ids in rendered(folder)], abs=1e-5)
        assert all(ids[-1] == END_ID for ids in rendered(folder))
    assert texts["eos"] != pytest.approx(texts["none"], abs=1e-3)


@pytest.mark.parametrize(
    ("layer", "bias", "named", "changed"),
    [
        ("v_head.summary", True, None, {}),
        ("value_head", False, None, {}),
        ("my_rewards", False, None, {"value_head_prefix": "my_rewards"}),
        ("judge.out", True, "judge.out", {}),
    ],
)
@pytest.mark.parametrize("tokens", [1, 1000])
def test_a_head_of_another_name(
    layer: str, bias: bool, named: str | None, changed: dict[str, Any], tokens: int, tmp_path: Path, policy: Path
) -> None:
    folder = tmp_path / "given"
    save_value_head(folder, layer, bias=bias, **changed)
    save_tokenizer(folder)
    model = loaded(folder, policy, named, tokens=tokens)
    wanted = [value_of(folder, layer, ids) for ids in rendered(folder)]
    assert model.score_texts(PROMPTS, REPLIES) == pytest.approx(wanted, abs=1e-5)
    assert model.facts
    line = model.facts.line()
    assert line is not None
    assert f"reward model {folder} (gpt2): its layer {layer}, at the last token; text is encoded with its own" in line


def test_openrlhfs_normalisation(tmp_path: Path, policy: Path) -> None:
    folder = tmp_path / "given"
    normal = {"normalize_reward": True, "mean": 0.5, "std": 2.0}
    save_value_head(folder, "value_head", bias=False, value_head_prefix="value_head", **normal)
    save_tokenizer(folder)
    wanted = [(value_of(folder, "value_head", ids) - 0.5) / 2.0 for ids in rendered(folder)]
    for standardise in (False, True):  # it is not done twice
        model = loaded(folder, policy, standardise=standardise)
        assert model.score_texts(PROMPTS, REPLIES) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("shares_tokens", [False, True])
def test_standardised_scores(tmp_path: Path, policy: Path, shares_tokens: bool) -> None:
    folder = tmp_path / "given"
    save_classifier(folder, "llama", mean=-0.25, std=0.5)
    save_tokenizer(folder)
    of_policy = folder if shares_tokens else policy
    plain, scaled = (loaded(folder, of_policy, standardise=standardise) for standardise in (False, True))
    wanted = [(score + 0.25) / 0.5 for score in plain.score_texts(PROMPTS, REPLIES)]
    assert scaled.score_texts(PROMPTS, REPLIES) == pytest.approx(wanted)
    if shares_tokens:
        pairs = {"prompt_ids": [[5, 6]], "chosen_ids": [[7]], "rejected_ids": [[8, 9]]}
        of_pairs = [*plain.score_id_pairs(pairs).chosen, *plain.score_id_pairs(pairs).rejected]
        found = scaled.score_id_pairs(pairs)
        assert [*found.chosen, *found.rejected] == pytest.approx([(score + 0.25) / 0.5 for score in of_pairs])


@pytest.mark.parametrize("kept", [{}, {"mean": 1.0}, {"mean": 0.0, "std": 0.0}, {"mean": 0.0, "std": "1"}])
def test_scores_that_cannot_be_standardised_are_refused(tmp_path: Path, policy: Path, kept: dict[str, Any]) -> None:
    folder = tmp_path / "given"
    save_classifier(folder, "llama", **kept)
    save_tokenizer(folder)
    with pytest.raises(StageError, match=r"given/config.json has no 'mean' and 'std' of scores .*reward: false$"):
        loaded(folder, policy, standardise=True)


def test_without_a_chat_template_the_text_is_plain(tmp_path: Path, policy: Path) -> None:
    folder = tmp_path / "given"
    save_classifier(folder, "distilbert", labels={0: "NEGATIVE", 1: "POSITIVE"})
    tokenizer = save_tokenizer(folder, template=None)
    model = loaded(folder, policy, label="POSITIVE")
    plain = ["\n".join([*(m["content"] for m in p), r]) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    wanted = [float(logits_of(folder)([tokenizer(text).input_ids])[0, 1]) for text in plain]
    assert model.score_texts(PROMPTS, REPLIES) == pytest.approx(wanted, abs=1e-5)
    assert model.facts
    assert "label POSITIVE, by its own forward pass" in str(model.facts.line())
    assert "as plain text, since it has no chat template" in str(model.facts.line())
    (going_on,) = model.score_texts(["a good "], ["film"])
    assert going_on == pytest.approx(float(logits_of(folder)([tokenizer("a good film").input_ids])[0, 1]), abs=1e-5)
    episodes = [Episode(Prompt(0, [], p, {}), [], r, True, 0, None, []) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    assert model(episodes) == pytest.approx(wanted, abs=1e-5)


def test_a_prompt_of_text_and_one_with_tools(tmp_path: Path, policy: Path) -> None:
    """Text has no template, and the model's own template gets the row's tools."""
    template = "{{ tools[0].function.name if tools }}{% for message in messages %}{{ message.content }}</s>{% endfor %}"
    folder = tmp_path / "given"
    save_classifier(folder, "llama")
    tokenizer = save_tokenizer(folder, template=template)
    tools = {"tools": [{"type": "function", "function": {"name": "search"}}]}
    user = [{"role": "user", "content": "a film"}]
    prompts = [Prompt(0, [], [], {}, {"text": "a bad "}), Prompt(1, [], user, {}, tools), Prompt(2, [], user, {})]
    texts = ["<s>a bad film</s>", "searcha film</s>film</s>", "a film</s>film</s>"]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    scores = loaded(folder, policy)([Episode(prompt, [], "film", True, 0, None, []) for prompt in prompts])
    assert scores == pytest.approx([float(logits_of(folder)([row])) for row in ids], abs=1e-5)


def test_what_is_too_long_for_it_is_refused(tmp_path: Path, policy: Path) -> None:
    folder = tmp_path / "given"
    save_classifier(folder, "roberta")
    save_tokenizer(folder)
    with pytest.raises(
        StageError, match=r"given reads at most 128 tokens of its own, and a prompt with its reply has "
    ):
        loaded(folder, policy).score_texts(PROMPTS[:1], ["film " * 200])


@pytest.mark.parametrize("kind", ["distilbert", "roberta"])
def test_as_many_tokens_as_a_model_has_positions(kind: str, tmp_path: Path, policy: Path) -> None:
    """Where its tokenizer knows of no limit."""
    folder = tmp_path / "given"
    save_classifier(folder, kind)
    tokenizer = save_tokenizer(folder, template=None, longest=10**30)
    model = loaded(folder, policy)
    longest = {"distilbert": 128, "roberta": 129}[kind]  # RoBERTa's 130 start after the pad token's 0
    text = tokenizer.decode([30] * (longest - 2))  # between <s> and </s>
    assert model.texts
    assert [len(ids) for ids in model.texts.encode([""], [text])] == [longest]
    assert model.score_texts([""], [text]) == pytest.approx([float(logits_of(folder)([tokenizer(text).input_ids]))])
    with pytest.raises(StageError, match=rf"reads at most {longest} tokens of its own, .* has {longest + 1} "):
        model.score_texts([""], [text + tokenizer.decode([31])])


CALLING = (
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{% for message in messages %}"
    "<s>{{ message.content }}{% for call in message.tool_calls or [] %}({{ call.function.name }}){% endfor %}</s>"
    "{% endfor %}"
)


def calling(name: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": {"where": "a"}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def test_the_calls_of_a_reply_are_read(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "a film"}]
    tools = [{"type": "function", "function": {"name": "good", "parameters": {}}}]
    for name, template, prompt, expected in (
        ("rendered", CALLING, asked, "good;<s>a film</s><s>(good)</s>"),
        ("plain", None, asked, '<s>a film\n{"name": "good", "arguments": {"where": "a"}}</s>'),
        ("going on", None, "a film", '<s>a film{"name": "good", "arguments": {"where": "a"}}</s>'),
    ):
        save_classifier(tmp_path / name, "gpt2")
        tokenizer = save_tokenizer(tmp_path / name, template=template)
        texts = RewardTexts(tmp_path / name, trust_remote_code=False)
        (ids,) = texts.encode([prompt], [calling("good")], [Context(tools)])
        assert tokenizer.decode(ids) == expected
    save_tokenizer(tmp_path / "rendered", template=TEMPLATE)
    texts = RewardTexts(tmp_path / "rendered", trust_remote_code=False)
    with pytest.raises(StageError, match=r"rendered: the chat template leaves out the calls of tools: 'good' is not"):
        texts.encode([asked], [calling("good")])


def test_what_is_no_reward_model(tmp_path: Path, policy: Path) -> None:
    folder = tmp_path / "given"
    tiny_llama().save_pretrained(folder)
    save_tokenizer(folder)
    with pytest.raises(StageError, match=r"given is not a reward model: its config\.json names no sequence classifier"):
        loaded(folder, policy)
    with pytest.raises(StageError, match=r"given has no layer 'v_head', which reward_head names"):
        loaded(folder, policy, "v_head")
    with pytest.raises(StageError, match=r"is a layer with 23 outputs"):
        loaded(folder, policy, "lm_head")


def test_two_heads_must_be_told_apart(tmp_path: Path, policy: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "given"
    save_value_head(folder, "value_head", bias=False)
    save_tokenizer(folder)
    weights = load_file(folder / "model.safetensors") | {"v_head.summary.weight": torch.randn(1, 16)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        StageError, match=r"given has several layers that could give a score; .*v_head.summary.*value_h"
    ):
        loaded(folder, policy)
    loaded(folder, policy, "value_head")


def test_the_policys_own_tokenizer_means_ids(tmp_path: Path) -> None:
    """A decoder that shares it reads ids at the last token, and text becomes the ids that the pipeline gives it."""
    folder, policy = tmp_path / "given", tmp_path / "policy"
    save_classifier(folder, "llama")
    save_tokenizer(folder, template=TEMPLATE)
    policy.mkdir()
    for name in NAMES:
        (policy / name).write_bytes((folder / name).read_bytes())
    model = loaded(folder, policy)
    prompts, replies = [[5, 6, 7], [8]], [[9, END_ID], [10, 11, 12]]
    wanted = [float(logits_of(folder)([p + r])) for p, r in zip(prompts, replies, strict=True)]
    assert model.score_ids(prompts, replies) == pytest.approx(wanted, abs=1e-5)
    assert model.facts
    assert model.facts.line() is None
    ids = rendered(folder)
    assert all(row[-1] == END_ID for row in ids)
    for ended, cut in ((True, None), (False, -1)):
        found = model.score_texts(PROMPTS, REPLIES, [ended] * 3)
        assert found == pytest.approx([float(logits_of(folder)([row[:cut]])) for row in ids], abs=1e-5)


def test_a_label_of_a_classifier_with_the_policys_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    save_classifier(folder, "gpt2", labels={0: "a", 1: "b"})
    save_tokenizer(folder)
    model = loaded(folder, folder, label="b")
    wanted = [float(logits_of(folder)([[5, 6, 7, *reply]])[0, 1]) for reply in ([8, 9], [10])]
    assert model.score_ids([[5, 6, 7]] * 2, [[8, 9], [10]]) == pytest.approx(wanted, abs=1e-5)
    assert model.facts
    assert "label b, by its own forward pass; it reads the policy's ids" in str(model.facts.line())


@pytest.mark.parametrize("names", [["a", "a"], {"0": "a", "2": "b"}])
def test_labels_that_make_no_sense(names: Any, tmp_path: Path, policy: Path) -> None:
    folder = tmp_path / "given"
    save_classifier(folder, "llama", labels={0: "a", 1: "b"})
    save_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": names}))
    with pytest.raises(StageError, match=r"config\.json: expected in 'id2label' a name for each number from 0 on"):
        loaded(folder, policy, label="a")
