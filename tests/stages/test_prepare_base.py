"""The base model: from scratch, from a folder, from the Hub; what every later stage takes for granted of it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash
from stages.lib.data.chat import decode_completion, encode_completion, encode_prompt
from stages.prepare_base import MARKER_NOISE, corpus_texts, main
from tests.hub_server import HubServer, repository_of_folder
from tests.loaded_python import loaded_python
from tests.real_files import PROJECT, real_file

TEMPLATE = str(PROJECT / "stages/templates/chat.jinja")
MARKERS = ["<|system|>", "<|user|>", "<|assistant|>"]
FILES = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
NEW = {
    "corpus": "sft.jsonl",
    "chat_template": "chat.jinja",
    "special_tokens": MARKERS,
    "dtype": "float32",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "layers": 2,
    "heads": 4,
    "key_value_heads": 2,
    "max_positions": 64,
}
GIVEN = {"chat_template": "chat.jinja", "special_tokens": MARKERS, "eos_token": None, "dtype": "float32"}
PROMPT = [{"role": "user", "content": "Once upon a time"}]
REPLY = {"role": "assistant", "content": "there was a film"}


def write_settings(folder, base, seed, *, trust=False):
    """Write corpus, chat templates and settings below `folder`; `base` is {group of prepare_base: its settings}."""
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    if not (folder / "stages/chat_templates").exists():
        shutil.copytree(PROJECT / "stages/chat_templates", folder / "stages/chat_templates")
    row = {"messages": [{"role": "user", "content": "a film of note"}, {"role": "assistant", "content": "a fine film"}]}
    (folder / "sft.jsonl").write_text((json.dumps(row) + "\n") * 20)
    models = {group: {"base": base[group]} if group in base else {} for group in ("scratch", "files", "hub")}
    settings = {"seed": seed, "kernels": "portable", "trust_remote_code": trust, "prepare_base": models}
    (folder / "params.yaml").write_text(json.dumps(settings))


def new(**changes):
    return {"scratch": NEW | changes}


def local(path, **changes):
    return {"files": {"path": str(path), **GIVEN, **changes}}


def run_script(folder, base=None, seed=17, env=None, *, trust=False):
    write_settings(folder, base or new(), seed, trust=trust)
    environment = {**(env or os.environ), "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        [*loaded_python(environment), "-m", "stages.prepare_base", "--out", "models"],
        cwd=folder,
        stdin=subprocess.DEVNULL,  # whoever asks gets no answer
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def prepare(folder, base=None, seed=17, *, trust=False):
    """The stage in this process, without the seconds that a script takes to start; returns the base model's folder."""
    write_settings(folder, base or new(), seed, trust=trust)
    with contextlib.chdir(folder):
        main(out=Path("models"))
    return folder / "models/base"


def without_card(base):
    """A base model's files but for its card, which names the model that it was made from."""
    return {path.name: path.read_bytes() for path in base.iterdir() if path.name != "README.md"}


def loaded(base):
    return AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)


def assert_fit_for_use(base):
    """What later stages take for granted: whole, agreed ids, a pad that stands for nothing, a template that works."""
    assert sorted(path.name for path in base.iterdir()) == FILES
    model, tokenizer = loaded(base)
    config, generation = (json.loads((base / name).read_text()) for name in ("config.json", "generation_config.json"))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, key) == config.get(key) == generation.get(key), key
    assert set(generation) <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    assert tokenizer.pad_token_id not in {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, None}
    assert config["vocab_size"] == model.get_input_embeddings().weight.shape[0] > max(tokenizer.get_vocab().values())
    ids = encode_completion(tokenizer, PROMPT, REPLY)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in encode_prompt(tokenizer, PROMPT) + ids
    assert decode_completion(tokenizer, ids) == REPLY["content"]
    assert model(torch.tensor([encode_prompt(tokenizer, PROMPT) + ids])).logits.isfinite().all()
    for name in set(FILES) - {"model.safetensors"}:
        assert str(base.parent.parent) not in (base / name).read_text(), name


# From scratch.


@pytest.fixture(scope="module")
def scratch_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch")
    for name in ("one", "two"):
        process = run_script(folder / name)
        assert process.returncode == 0, process.stderr
    return folder / "one/models/base", folder / "two/models/base"


def test_a_model_from_scratch(scratch_runs):
    base = scratch_runs[0]
    assert_fit_for_use(base)
    model, tokenizer = loaded(base)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<|pad|>", "<|endoftext|>", *MARKERS]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer.tokenize("a film") == ["a", "Ġfilm"]  # a word of the corpus is one token
    unseen = {"role": "assistant", "content": "Zürich\x00 🎬"}  # no byte is foreign to it
    assert decode_completion(tokenizer, encode_completion(tokenizer, PROMPT, unseen)) == unseen["content"]
    head_width = 16 // 4
    attention = 2 * 16 * 16 + 2 * 16 * 2 * head_width
    layer = attention + 3 * 16 * 24 + 2 * 16
    assert model.num_parameters() == len(tokenizer) * 16 + 2 * layer + 16  # the head is the embedding
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 64


def test_a_model_from_scratch_has_the_same_bytes_twice(scratch_runs):
    assert dvc_hash(scratch_runs[0]) == dvc_hash(scratch_runs[1])


def test_another_seed_gives_other_weights_and_the_same_tokenizer(scratch_runs, tmp_path):
    other = prepare(tmp_path, seed=18)
    same = [name for name in FILES if (other / name).read_bytes() == (scratch_runs[0] / name).read_bytes()]
    assert set(FILES) - set(same) == {"model.safetensors", "README.md"}  # the card has the seed


def test_weights_have_the_dtype_asked_for(tmp_path):
    base = prepare(tmp_path, new(dtype="bfloat16"))
    assert {tensor.dtype for tensor in load_file(base / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((base / "config.json").read_text())["dtype"] == "bfloat16"


# From a folder.


def tiny_pretrained(folder, tokenizer_folder, rows, config_class=LlamaConfig, **sizes):
    """A model of random weights with `rows` embedding rows, beside a real tokenizer."""
    torch.manual_seed(0)
    if config_class is GPT2Config:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=8, n_layer=1, n_head=2, n_positions=64))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2} | sizes
        model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, max_position_embeddings=64, **sizes))
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=[1, 2])
    model.save_pretrained(folder)
    for file in tokenizer_folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_stories260k_gets_a_pad_and_markers_and_keeps_its_weights(tmp_path):
    source = real_file("models/stories260K")
    base = prepare(tmp_path, local(source))
    assert_fit_for_use(base)
    before, after = load_file(source / "model.safetensors"), load_file(base / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before if key != name)
    assert torch.equal(after[name][:512], before[name])
    tokenizer = loaded(base)[1]
    assert tokenizer.convert_ids_to_tokens(range(512, 516)) == [*MARKERS, "<|pad|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 515)
    mean, spread = before[name].mean(0), before[name].std(0)
    torch.testing.assert_close(after[name][515], mean)
    noise = (after[name][512:515] - mean) / (MARKER_NOISE * spread)
    assert 0.8 < noise.std() < 1.2
    assert encode_prompt(tokenizer, PROMPT)[:2] == [1, 513]
    assert dvc_hash(prepare(tmp_path / "again", local(source))) == dvc_hash(base)


def test_a_model_whose_pad_eos_and_bos_are_one_token_gets_a_pad(tmp_path):
    source = tiny_pretrained(tmp_path / "gpt2", real_file("tokenizers/gpt2"), 50257, GPT2Config)
    base = prepare(tmp_path, local(source))
    assert_fit_for_use(base)
    tokenizer = loaded(base)[1]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (50256, 50260, 50261)
    assert encode_prompt(tokenizer, PROMPT)[0] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_a_free_row_is_used_and_a_template_of_its_own_is_kept(tmp_path):
    tokenizer_folder = real_file("tokenizers/smollm2-135m-instruct")
    source = tiny_pretrained(tmp_path / "smollm2", tokenizer_folder, 49160, tie_word_embeddings=False)
    base = prepare(tmp_path, local(source, chat_template=None, special_tokens=[]))
    assert_fit_for_use(base)
    model, tokenizer = loaded(base)
    assert (tokenizer.eos_token, tokenizer.pad_token_id, model.config.vocab_size) == ("<|im_end|>", 49152, 49160)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tokenizer_folder).chat_template
    before, after = load_file(source / "model.safetensors"), load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # two matrices, a row set in each
        expected = before[name].clone()
        expected[49152] = before[name][:49152].mean(0)
        torch.testing.assert_close(after[name], expected)


def test_a_pad_of_its_own_is_kept(scratch_runs, tmp_path):
    base = prepare(tmp_path, local(scratch_runs[0]))
    assert without_card(base) == without_card(scratch_runs[0])


def chatml(folder, tokenizer_folder):
    """A model that ends turns with <|im_end|> while its EOS is <|endoftext|>, as base models of Qwen2.5 do."""
    source = tiny_pretrained(folder, tokenizer_folder, 49152)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    return source


def test_the_token_that_ends_a_turn_becomes_eos(tmp_path):
    source = chatml(tmp_path / "chatml", real_file("tokenizers/smollm2-135m-instruct"))
    own = partial(local, source, chat_template=None, special_tokens=[])
    message = r"ends a reply with '<\|im_end\|>', but EOS is <\|endoftext\|>: set the model's eos_token"
    with pytest.raises(StageError, match=message):
        prepare(tmp_path, own())
    base = prepare(tmp_path, own(eos_token="<|im_end|>"))
    assert_fit_for_use(base)
    tokenizer = loaded(base)[1]
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("<|im_end|>", "<|endoftext|>", 49152)
    with pytest.raises(StageError, match=r"eos_token: .* has no token <\|nothing\|>"):
        prepare(tmp_path, own(eos_token="<|nothing|>"))


# What is refused.


@pytest.fixture
def copy_of_scratch(scratch_runs, tmp_path):
    return Path(shutil.copytree(scratch_runs[0], tmp_path / "source"))


@pytest.mark.parametrize(
    ("removed", "what"),
    [
        ("config.json", "is not a model folder: config.json is missing"),
        ("model.safetensors", "has no weights: expected model.safetensors or model.safetensors.index.json"),
        ("tokenizer.json", "has no tokenizer: expected tokenizer.json or"),
    ],
)
def test_a_folder_that_is_no_model(copy_of_scratch, tmp_path, removed, what):
    (copy_of_scratch / removed).unlink()
    with pytest.raises(StageError, match=f"source {what}"):
        prepare(tmp_path, local(copy_of_scratch))
    assert not (tmp_path / "models/base").exists()


def test_weights_that_are_cut_short_or_incomplete(copy_of_scratch, tmp_path):
    file = copy_of_scratch / "model.safetensors"
    weights = load_file(file)
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"1 weights are missing or of another shape.*layers\.1\.mlp\.up_proj"):
        prepare(tmp_path, local(copy_of_scratch))
    save_file({**weights, "model.layers.1.mlp.up_proj.weight": lost[:3]}, file, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"source( cannot be loaded|: 1 weights are missing or of another shape)"):
        prepare(tmp_path, local(copy_of_scratch))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(StageError, match="source cannot be loaded as a causal language model"):
        prepare(tmp_path, local(copy_of_scratch))


def test_a_model_that_scales_its_logits_is_refused(copy_of_scratch, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rows = json.loads((copy_of_scratch / "config.json").read_text())["vocab_size"]
    for scaling in (1.0, 8.0):
        torch.manual_seed(0)
        GraniteForCausalLM(GraniteConfig(vocab_size=rows, logits_scaling=scaling, **sizes)).save_pretrained(
            copy_of_scratch
        )
        if scaling == 1.0:
            assert (prepare(tmp_path / "plain", local(copy_of_scratch)) / "model.safetensors").is_file()
    with pytest.raises(StageError, match=r"cannot be trained here: models of type granite compute their logits"):
        prepare(tmp_path, local(copy_of_scratch))


def test_what_a_model_brings_and_nothing_uses_is_told(copy_of_scratch, tmp_path, capsys):
    file = copy_of_scratch / "model.safetensors"
    save_file(load_file(file) | {"model.layers.7.extra": torch.ones(2)}, file, {"format": "pt"})
    config = json.loads((copy_of_scratch / "config.json").read_text())
    changes = {"eos_token_id": [1, 2], "auto_map": {"AutoModelForCausalLM": "own.Model"}}
    (copy_of_scratch / "config.json").write_text(json.dumps(config | changes))
    prepare(tmp_path, local(copy_of_scratch))
    told = capsys.readouterr().err
    assert f"{copy_of_scratch}: 1 of its weights are not read, since" in told
    assert "has no place for them, the first is model.layers.7.extra\n" in told
    assert f"{copy_of_scratch}: the Python code that it brings (config.json: auto_map) is not run; what" in told
    assert f"{copy_of_scratch}: config.json has [1, 2] as eos_token_id, the tokenizer 1 (<|endoftext|>): the" in told
    assert len(told.splitlines()) == 3


def test_a_quantization_that_transformers_does_not_know_is_refused(copy_of_scratch, tmp_path):
    config = json.loads((copy_of_scratch / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "none"}
    (copy_of_scratch / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match=r"knows no quantization_config like \{'quant_method': 'none'\}; remove it if"):
        prepare(tmp_path, local(copy_of_scratch))


def test_a_tokenizer_of_another_model(copy_of_scratch, tmp_path):
    source = tiny_pretrained(tmp_path / "other", copy_of_scratch, 100)
    with pytest.raises(StageError, match=r"the tokenizer has ids up to \d+, the embedding 100 rows"):
        prepare(tmp_path, local(source))


def test_no_template_at_all(copy_of_scratch, tmp_path):
    (copy_of_scratch / "chat_template.jinja").unlink()
    with pytest.raises(StageError, match=r"source has no chat template of its own; set its chat_template"):
        prepare(tmp_path, local(copy_of_scratch, chat_template=None))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}", "leaves out a message of the user or changes it"),
        ("{{ raise_exception('never') }}", "the chat template refuses these messages: never"),
        ("{% for m in messages %}", "the chat template refuses these messages"),
        ("{{ messages[0]['content'] }}", "leaves out a reply"),
    ],
)
def test_a_template_that_does_not_work(tmp_path, template, message):
    write_settings(tmp_path, new(), 17)
    (tmp_path / "stages/chat_templates/own.jinja").write_text(template)
    with pytest.raises(StageError, match=message):
        prepare(tmp_path, new(chat_template="own.jinja"))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({}, "no model is named base: one of scratch, files or hub must be"),
        (new() | local("models/pretrained"), "two models are named base, of scratch, files and hub"),
        (
            {"hub": {"model": "a/b", "revision": "main", **GIVEN}},
            "revision must be a full commit hash of 40 hexadecimal digits, found main",
        ),
        ({"hub": {"model": "a/b/c", "revision": "0" * 40, **GIVEN}}, "model must be owner/name, found a/b/c"),
        (new(chat_template=None), "chat_template: expected text, found nothing"),
        (new(chat_template="../own.jinja"), r"chat_template: expected the name of a file, .* found '\.\./own\.jinja'"),
        (new(special_tokens=["<a>", "<a>"]), "special_tokens holds a token twice"),
        (local("models/pretrained", special_tokens=["<a>", "<a>"]), "special_tokens holds a token twice"),
        (new(special_tokens=["<|pad|>"]), r"special_tokens must not hold <\|pad\|>"),
        (new(vocab_size=260), r"vocab_size must be at least 261"),
        (new(heads=3), r"hidden_size \(16\) must be a multiple of twice heads \(3\)"),
        (new(key_value_heads=3), r"heads \(4\) must be a multiple of key_value_heads \(3\)"),
    ],
)
def test_settings_that_contradict(tmp_path, base, message):
    write_settings(tmp_path, base, 17)
    with contextlib.chdir(tmp_path), pytest.raises(StageError, match=message):
        main(out=Path("models"), name="base")


def test_a_model_is_made_under_its_own_name(scratch_runs, tmp_path):
    write_settings(tmp_path, new(), 17)
    params = json.loads((tmp_path / "params.yaml").read_text())
    params["prepare_base"]["files"]["instruct"] = {"path": str(scratch_runs[0]), **GIVEN}
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    with contextlib.chdir(tmp_path):
        main(out=Path("models"), name="instruct")
        with pytest.raises(StageError, match="section 'prepare_base' has base, instruct: say which with --name"):
            main(out=Path("models"))
    assert without_card(tmp_path / "models/instruct") == without_card(scratch_runs[0])
    assert not (tmp_path / "models/base").exists()


def test_a_refusal_is_one_message_and_exit_code_2(tmp_path):
    process = run_script(tmp_path, local("nowhere"))
    assert process.returncode == 2
    assert process.stderr.splitlines() == ["error: nowhere is not a model folder: there is no such folder"]
    assert not (tmp_path / "models/base").exists()


def test_a_corpus_row_without_text_is_named(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"messages": []}\n{"answer": []}\n')
    with pytest.raises(StageError, match=r"other\.jsonl, line 2: expected one of text, messages, .*, found answer"):
        prepare(tmp_path, new(corpus="other.jsonl"))


def test_the_corpus_may_be_rows_of_any_kind(tmp_path):
    pair = {"prompt": [{"role": "user", "content": "one"}], "chosen": [REPLY], "rejected": [REPLY | {"content": "two"}]}
    lines = [{"text": "three"}, pair, {"prompt": pair["prompt"], "completion": [REPLY], "label": True}]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = ["three", "one", REPLY["content"], "two", "one", REPLY["content"]]
    assert list(corpus_texts(tmp_path / "mixed.jsonl")) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[]", r"config\.json: expected a JSON object, found list"),
        ("config.json", b"\xff", r"config\.json: not UTF-8 text"),
        ("config.json", b"[" * 100_000, "brackets nested too deeply"),
        ("config.json", {"vocab_size": "x"}, "expected a whole number as 'vocab_size', found 'x'"),
        ("config.json", {"vocab_size": 10**400}, "a number of more than 100 digits"),
        ("config.json", {"num_hidden_layers": 10**9}, "expected a whole number from 1 to 10000"),
        ("config.json", {"rope_parameters": "linear"}, "expected an object as 'rope_parameters'"),
        ("config.json", {"text_config": [1]}, "expected an object as 'text_config'"),
        ("config.json", {"hidden_size": "x"}, "cannot be loaded as a causal language model: "),
        ("config.json", {"num_attention_heads": 3}, "cannot be loaded as|cannot be trained here|of another shape"),
        ("config.json", {"model_type": "never"}, "cannot be loaded as a causal language model: .* `never`"),
        ("config.json", {"transformers_weights": "../other.safetensors"}, "rename the file to model.safetensors"),
        ("generation_config.json", b"[1]", r"generation_config\.json: expected a JSON object"),
        ("tokenizer_config.json", b'"x"', r"tokenizer_config\.json: expected a JSON object, found str"),
        ("tokenizer_config.json", {"eos_token": 5}, "source"),
        ("tokenizer.json", b"{}", "cannot be loaded as a causal language model: "),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}, "cannot be loaded as"),
        ("model.safetensors", b"", "cannot be loaded as a causal language model: "),
        ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}", "cannot be loaded as a causal language model: "),
        (
            "model.safetensors",
            (9).to_bytes(8, "little") + b"[[[[[[[[[",
            "cannot be loaded as a causal language model: ",
        ),
        ("adapter_config.json", b"{}", r"holds an adapter \(adapter_config\.json\), not a whole model: merge it"),
    ],
)
def test_a_file_of_a_model_that_makes_no_sense(copy_of_scratch, tmp_path, name, content, message):
    file = copy_of_scratch / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content).encode()
    file.write_bytes(content)
    with pytest.raises(StageError, match=message):
        prepare(tmp_path, local(copy_of_scratch))
    assert not (tmp_path / "models/base").exists()


def test_weights_that_are_not_numbers_are_named(copy_of_scratch, tmp_path):
    file = copy_of_scratch / "model.safetensors"
    weights = load_file(file)
    for value in (float("nan"), float("-inf")):
        weights["model.embed_tokens.weight"][-1, 3] = value  # of an id that no trial would look at
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(StageError, match=r"its weight model\.embed_tokens\.weight holds NaN or infinite numbers"):
            prepare(tmp_path, local(copy_of_scratch))


class Dangerous:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "consolidated.00.pth"])
def test_a_pickle_is_never_read(copy_of_scratch, tmp_path, name):
    (copy_of_scratch / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Dangerous(tmp_path / "mark")}, copy_of_scratch / name)
    if "of" in name:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (copy_of_scratch / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(StageError) as refused:
        prepare(tmp_path, local(copy_of_scratch))
    message = str(refused.value)
    assert "has its weights as a pickle alone" in message
    assert "save_pretrained(FOLDER)` writes model.safetensors" in message
    assert "huggingface.co/spaces/safetensors/convert" in message
    # Nor where an index of safetensors names it.
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (copy_of_scratch / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StageError, match=r"names '.*': expected a \.safetensors file of the same folder"):
        prepare(tmp_path, local(copy_of_scratch))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({"a": "../../other.safetensors"}, "names '../../other.safetensors': expected a .safetensors file of the same"),
        ({"a": "/etc/other.safetensors"}, "names '/etc/other.safetensors': expected a .safetensors file of the same"),
        ({"a": "gone.safetensors"}, "names gone.safetensors, which is missing"),
        ({"a": 7}, "expected 'weight_map' with the file of each weight"),
        ([], "expected 'weight_map' with the file of each weight"),
        (None, "expected 'weight_map' with the file of each weight"),
    ],
)
def test_an_index_of_weights_that_cannot_be(copy_of_scratch, tmp_path, shards, message):
    (copy_of_scratch / "model.safetensors").rename(tmp_path / "other.safetensors")
    (copy_of_scratch / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(StageError, match=re.escape(message)):
        prepare(tmp_path, local(copy_of_scratch))


def test_a_model_in_shards(copy_of_scratch, scratch_runs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(copy_of_scratch)
    (copy_of_scratch / "model.safetensors").unlink()
    model.save_pretrained(copy_of_scratch, max_shard_size="10KB")
    assert len(list(copy_of_scratch.glob("model-*.safetensors"))) > 1
    assert without_card(prepare(tmp_path, local(copy_of_scratch))) == without_card(scratch_runs[0])


def test_a_model_folder_that_is_a_file(tmp_path):
    (tmp_path / "model").write_text("x")
    with pytest.raises(StageError, match="model is not a model folder: there is no such folder"):
        prepare(tmp_path, local("model"))


def test_an_architecture_without_a_classifier_is_a_warning(copy_of_scratch, tmp_path, capsys):
    rows = json.loads((copy_of_scratch / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    CohereForCausalLM(CohereConfig(vocab_size=rows, logit_scale=1.0, **sizes)).save_pretrained(copy_of_scratch)
    assert (prepare(tmp_path, local(copy_of_scratch)) / "model.safetensors").is_file()
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "transformers has no sequence classifier for models of type cohere: train_rm" in warning


# Code that a model brings.

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({mark!r}).write_text("run")
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN_MODEL = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
OWN_TOKENIZER = {"AutoTokenizer": ["modeling_own.OwnTokenizer", "modeling_own.OwnTokenizer"]}


def add(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def with_own_code(folder, mark, *, model=True, tokenizer=True, model_type="own_llama"):
    (folder / "modeling_own.py").write_text(CODE.format(mark=str(mark)))
    if model:
        add(folder / "config.json", model_type=model_type, architectures=["OwnForCausalLM"], auto_map=OWN_MODEL)
    if tokenizer:
        add(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=OWN_TOKENIZER)
    return folder


@pytest.mark.parametrize("parts", [{"tokenizer": False}, {"model": False}, {}])
def test_code_of_a_model_is_not_run_unasked(copy_of_scratch, tmp_path, parts):
    mark = tmp_path / "mark"
    process = run_script(tmp_path, local(with_own_code(copy_of_scratch, mark, **parts)))
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "it brings Python code of its own (auto_map), which is not run; if you trust" in line
    assert line.endswith("set trust_remote_code: true in params.yaml")
    assert "[y/N]" not in process.stdout
    assert not mark.exists()


def test_a_known_architecture_is_the_librarys_whatever_code_it_brings(copy_of_scratch, scratch_runs, tmp_path):
    mark = tmp_path / "mark"
    source = with_own_code(copy_of_scratch, mark, tokenizer=False, model_type="llama")
    add(source / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", auto_map=OWN_TOKENIZER)
    base = prepare(tmp_path, local(source))
    assert without_card(base) == without_card(scratch_runs[0])  # it is forgotten that there was code
    assert not mark.exists()


def test_a_kernel_that_a_configuration_names_is_not_used(copy_of_scratch, scratch_runs, tmp_path):
    add(copy_of_scratch / "config.json", attn_implementation="some/kernel")  # of the Hub: code
    assert without_card(prepare(tmp_path, local(copy_of_scratch))) == without_card(scratch_runs[0])


def test_code_that_is_trusted_is_run_and_goes_with_the_model(copy_of_scratch, scratch_runs, tmp_path):
    mark = tmp_path / "mark"
    source = with_own_code(copy_of_scratch, mark)
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = run_script(tmp_path, local(source), env=env, trust=True)
    assert process.returncode == 0, process.stderr
    assert mark.read_text() == "run"
    base = tmp_path / "models/base"
    assert '"trust_remote_code": true' in (base / "README.md").read_text()
    assert (base / "model.safetensors").read_bytes() == (scratch_runs[0] / "model.safetensors").read_bytes()
    config = json.loads((base / "config.json").read_text())
    assert (config["model_type"], config["auto_map"]) == ("own_llama", OWN_MODEL)
    assert (base / "modeling_own.py").read_text() == (source / "modeling_own.py").read_text()
    # The tokenizer needs no code from here on.
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (base / name).read_bytes() == (scratch_runs[0] / name).read_bytes(), name


# From the Hub.


def test_a_model_of_the_hub(scratch_runs, tmp_path):
    """The bytes of the folder it was served from; a revision that is not there is one message."""
    commit = "060db6499f32faf8b98477b0a26969ef7d8b9987"
    hub = {"model": "some/model", "revision": commit, **GIVEN}
    with HubServer([repository_of_folder("models", "some/model", commit, scratch_runs[0])]) as server:
        env = server.environment(tmp_path / "cache")
        process = run_script(tmp_path, {"hub": hub}, env=env)
        assert process.returncode == 0, process.stderr
        assert without_card(tmp_path / "models/base") == without_card(scratch_runs[0])
        card = ModelCard.load(tmp_path / "models/base/README.md")
        assert card.data.base_model == "some/model"
        assert f'"revision": "{commit}"' in card.text
        process = run_script(tmp_path / "other", {"hub": hub | {"revision": "0" * 40}}, env=env)
    assert process.returncode == 2
    (message,) = process.stderr.splitlines()
    assert message.startswith(f"error: Hub model some/model at revision {'0' * 40} cannot be downloaded (")
