"""A model to start from, made fit for every later stage: one EOS, a pad id of its own, role markers, a chat template.

A model made from scratch gets a byte-level BPE tokenizer trained on the corpus and seeded random weights; a model from
a folder or from the Hub keeps its weights. The embedding rows of added tokens start at the mean of the rows that were
there, those of markers with a little seeded noise so that they differ.

The section `prepare_base` of params.yaml names the models; each is a stage of its own.

    python -m stages.prepare_base --name base --out models
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.lib.command.entries import EntryOption, entry_name
from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hashes
from stages.lib.command.jsonl import read_json, read_jsonl
from stages.lib.command.kernels import Kernels
from stages.lib.command.outputs import written_whole
from stages.lib.command.params import read_params, read_value
from stages.lib.command.run import run
from stages.lib.data.chat import decode_completion, encode_completion, encode_prompt
from stages.lib.data.conversations import Message, UnusableRowError, messages_from, text_from
from stages.lib.data.encoding import special_tokens
from stages.lib.data.template_process import template_process
from stages.lib.models.given_model import check_forward_pass, download, embedding_rows, ids_of, load_pretrained
from stages.lib.models.model_facts import read_model_facts
from stages.lib.models.tokenizer_files import TOKENIZER_FILES
from stages.lib.operations.run_log import log_run
from stages.lib.runs.model_card import shareable_path, write_model_card
from stages.lib.settings.declaration import plain
from stages.lib.settings.prepare_base import (
    EOS_TOKEN,
    PAD_TOKEN,
    ModelOfFolder,
    ModelOfHub,
    NewModel,
    PrepareBase,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AnyModel = NewModel | ModelOfFolder | ModelOfHub
TEMPLATES = Path("stages/chat_templates")
CORPUS_COLUMNS = ("text", "messages", "prompt", "chosen", "rejected", "completion")
MARKER_NOISE = 0.1  # in standard deviations of the rows it is added to


def corpus_texts(path: Path) -> Iterator[str]:
    """The texts of all rows of a prepared file, of whatever kind. Raises StageError naming file and line."""
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"{path}, line {number}"
        columns = [column for column in CORPUS_COLUMNS if column in row]
        if not columns:
            found = ", ".join(row) or "no keys"
            raise StageError(f"{where}: expected one of {', '.join(CORPUS_COLUMNS)}, found {found}")
        for column in columns:
            if column == "text":
                yield text_from(row[column], f"{where}, 'text'")
            else:
                messages = messages_from(row[column], f"{where}, '{column}'")
                yield from (message["content"] for message in messages)


def train_tokenizer(corpus: Path, settings: NewModel) -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer: any text can be encoded and comes back as it was. It has no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN, *settings.special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus_texts(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=settings.max_positions,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: "PreTrainedTokenizerBase", settings: NewModel, seed: int) -> "PreTrainedModel":
    """A Llama with tied embeddings and random weights from `seed`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=settings.max_positions,
        # The usual 0.02 suits widths of thousands; a narrow model with it needs far longer until its attention finds
        # what was asked for.
        initializer_range=settings.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(stage_seed(seed))
    return LlamaForCausalLM(config)


def stage_seed(seed: int) -> int:
    """A seed of this stage's own, so that its draws are not those of another stage with the same `seed`."""
    return int.from_bytes(hashlib.sha256(f"prepare_base {seed}".encode()).digest()[:4])


def set_template(tokenizer: "PreTrainedTokenizerBase", template: str | None, name: str) -> None:
    """Give the tokenizer a template of `stages/chat_templates`, or keep its own where `template` is None."""
    if template is not None:
        try:
            tokenizer.chat_template = (TEMPLATES / template).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise StageError(
                f"{TEMPLATES / template}: not UTF-8 text ({error.reason}): expected a chat template"
            ) from None
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not isinstance(tokenizer.chat_template, str) or not tokenizer.chat_template:
        raise StageError(
            f"{name} has no chat template of its own; set its chat_template to a file of {TEMPLATES}, "
            "for instance chat.jinja"
        )


def set_eos(tokenizer: "PreTrainedTokenizerBase", eos_token: str | None, name: str) -> None:
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise StageError(f"eos_token: {name} has no token {eos_token}")
        tokenizer.add_special_tokens({"eos_token": eos_token})
    if tokenizer.eos_token is None:
        raise StageError(f"{name} names no EOS token; set its eos_token to the token that ends a reply")


def add_tokens(tokenizer: "PreTrainedTokenizerBase", markers: tuple[str, ...]) -> None:
    """Add the markers that are not special tokens yet, and a pad token unless there is one that stands for no text."""
    tokenizer.add_tokens(list(markers), special_tokens=True)
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, *markers, None}
    if tokenizer.pad_token in used:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "right"


def start_new_rows(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", known: int, seed: int) -> None:
    """Set the embedding rows of the tokens from id `known` on, in free rows of the matrix or in rows added to it.

    A row starts at the mean of the rows of ids below `known`: a new output row then neither wins nor loses much. Rows
    of markers get noise of a tenth of those rows' standard deviation, so that they can be told apart; the pad's gets
    none.
    """
    import torch

    rows = embedding_rows(model)
    if ids_of(tokenizer) > rows:
        model.resize_token_embeddings(ids_of(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(stage_seed(seed))
    matrices: list[Any] = [model.get_input_embeddings().weight]
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        matrices.append(head.bias[:, None])
    for matrix in matrices:
        fill_rows(matrix, known, range(known, ids_of(tokenizer)), tokenizer.pad_token_id, generator)


def fill_rows(matrix: "torch.Tensor", known: int, new: range, pad_id: int, generator: "torch.Generator") -> None:
    """Set rows `new` of `matrix` (ids, width) from its first `known` rows, in float32 whatever its dtype."""
    import torch

    with torch.no_grad():
        trained = matrix[:known].float()
        mean, spread = trained.mean(0), trained.std(0)
        for token_id in new:
            noise = 0.0 if token_id == pad_id else torch.randn(mean.shape, generator=generator) * spread * MARKER_NOISE
            matrix[token_id] = (mean + noise).to(matrix.dtype)


def agree_on_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Config and generation config take the tokenizer's ids; sampling settings that came with a model are left out.

    They (a temperature, a repetition penalty, a list of ends) would change what another program generates with it.
    """
    from transformers import GenerationConfig

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.generation_config = GenerationConfig(**ids)


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise a StageError unless prompts render as beginnings, replies come back, and a reply's end is EOS."""
    reply: Message = {"role": "assistant", "content": "It is four."}
    first: list[Message] = [{"role": "user", "content": "What is two and two?"}]
    second: list[Message] = [*first, reply, {"role": "user", "content": "And again?"}]
    for prompt in (first, second):
        try:
            encode_prompt(tokenizer, prompt)
            ids = encode_completion(tokenizer, prompt, reply)
        except UnusableRowError as error:
            raise StageError(
                f"the tokenizer and its chat template do not give back a plain sample text ({error.args[0]})"
            ) from None
        ending = decode_completion(tokenizer, ids).rpartition(reply["content"])[2].strip()
        if any(text in ending for text in special_tokens(tokenizer).text_of.values()):
            raise StageError(
                f"the chat template ends a reply with {ending!r}, but EOS is {tokenizer.eos_token}: "
                "set the model's eos_token to the token that ends a reply, or its chat_template to a file"
            )


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", out: Path) -> None:
    """Write one folder with one weights file, and a tokenizer that transformers 4 and 5 load.

    Code that the model brought is written with it if it was run; else the configuration forgets that there was some.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, imported to save a model, warns without it
    if hasattr(model.config, "auto_map") and type(model).__module__.startswith("transformers."):
        delattr(model.config, "auto_map")
    model.save_pretrained(out, max_shard_size="1TB")
    tokenizer.save_pretrained(out)
    _write_plain_tokenizer_config(out / "tokenizer_config.json")
    for name in TOKENIZER_FILES:
        if not (out / name).is_file():
            raise StageError(f"the tokenizer cannot be written as {name}; use a model with a fast tokenizer")


def check_settings_again() -> None:
    """Check the settings against a Hub model, of which nothing was known before, and end the stage if they do not fit.

    In a process of its own: what the check reads cannot change the base model, and so is no dependency of it. Where DVC
    does not run the stage, it is by itself, and other stages' settings are not its concern.
    """
    if "DVC_STAGE" not in os.environ:
        return
    done = subprocess.run([sys.executable, "-m", "stages.code_manifest"], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _write_plain_tokenizer_config(file: Path) -> None:
    """Leave out how and from where the tokenizer was loaded: that is no property of it.

    Nor is code that it brought: tokenizer.json alone says how text is encoded, to classes of transformers' own.
    """
    config = read_json(file)
    own_code = config.pop("auto_map", None)
    config = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only", "backend")}
    if own_code or config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def shareable(settings: AnyModel) -> dict[str, Any]:
    """The settings as a model card shows them."""
    values = plain(settings)
    return values | {key: shareable_path(values[key]) for key in ("path", "corpus") if key in values}


def new_base(settings: NewModel, seed: int) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A new model and a tokenizer trained on the corpus."""
    import torch

    tokenizer = train_tokenizer(Path(settings.corpus), settings)
    set_template(tokenizer, settings.chat_template, "the new tokenizer")
    model = new_model(tokenizer, settings, seed).to(getattr(torch, settings.dtype))
    return model, tokenizer


def given_base(
    settings: ModelOfFolder | ModelOfHub, seed: int, *, trust_remote_code: bool
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A model of a folder or of the Hub, with the tokens that the pipeline needs."""
    if isinstance(settings, ModelOfHub):
        folder = download(settings.model, settings.revision, trust_remote_code=trust_remote_code)
        check_settings_again()
        name = f"Hub model {settings.model}"
    else:
        folder, name = Path(settings.path), settings.path
    model, tokenizer = load_pretrained(folder, settings.dtype, name, trust_remote_code=trust_remote_code)
    check_forward_pass(model, name)
    warn_of_no_classifier(model, name)
    set_template(tokenizer, settings.chat_template, name)
    set_eos(tokenizer, settings.eos_token, name)
    known = ids_of(tokenizer)
    add_tokens(tokenizer, settings.special_tokens)
    start_new_rows(model, tokenizer, known, seed)
    return model, tokenizer


def input_hashes(settings: AnyModel) -> dict[str, str]:
    """Content hash of each file that the model is made from, but for a Hub model, whose commit says it."""
    values = plain(settings)
    paths = [values[key] for key in ("path", "corpus") if key in values]
    paths += [str(TEMPLATES / settings.chat_template)] if settings.chat_template else []
    return dvc_hashes(Path(path) for path in paths)


def warn_of_no_classifier(model: "PreTrainedModel", name: str) -> None:
    facts = read_model_facts(model.config.to_dict(), name)
    if not facts.has_classifier:
        print(
            f"warning: {name}: transformers has no sequence classifier for models of type {facts.model_type}: "
            "train_rm, and so train_ppo and train_grpo, will refuse it; SFT and DPO work",
            file=sys.stderr,
        )


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the model's folder into, which has its name.")],
    name: EntryOption = None,
) -> None:
    """Make a model to start from."""
    started = time.monotonic()
    given = read_params("prepare_base", PrepareBase)
    name = entry_name(name, given.models, "prepare_base")
    settings, seed = given.models[name], read_value("seed", int)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    template_process()  # it loads while this one does
    if isinstance(settings, NewModel):
        model, tokenizer = new_base(settings, seed)
    else:
        model, tokenizer = given_base(settings, seed, trust_remote_code=trust_remote_code)
    agree_on_ids(model, tokenizer)
    check_template(tokenizer)
    with written_whole(out / name) as (folder,):
        save(model, tokenizer, folder)
        write_model_card(
            folder,
            stage="prepare_base",
            settings={given.place_of(name): shareable(settings), "seed": seed, "trust_remote_code": trust_remote_code}
            | {"kernels": kernels},
            inputs=input_hashes(settings),
            metrics={"parameters": model.num_parameters(), "tokens": len(tokenizer)},
            base_model=settings.model if isinstance(settings, ModelOfHub) else None,
        )
    log_run(f"prepare_base@{name}", dvc_hashes([out / name]), time.monotonic() - started)
    print(f"{out / name}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens, pad {tokenizer.pad_token}")


if __name__ == "__main__":
    run(main)
