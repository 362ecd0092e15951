"""Real files through all stages of data: rows are kept, and what a preview shows as trained is what the rows say."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stages.lib.data.prepared_rows import SPLITS
from stages.lib.data.token_rows import ENCODINGS
from stages.lib.data.token_tables import read_table
from stages.tools import preview_row
from tests.real_files import real_file
from tests.stages.data_stages import HALF, prepare, read, sources_of
from tests.stages.tiny_pipeline import call, change, inside, new_project, read_yaml, write_yaml

pytestmark = pytest.mark.slow

# Tools as in the templates of Hermes and Qwen.
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
POSITIONS = 8192
ROWS = 24
PREVIEWED = 1  # row of each kind: each loads the tokenizer
BRACKETS_AND_SPACE = " " + "".join(style.brackets for style in preview_row.STYLES.values())
FILES = {
    "data/hh-rlhf/harmless-base/test.jsonl.gz": {"kinds": ["sft", "preference", "prompts"]},
    "data/demo/alpaca_en_demo.json": {"kinds": ["sft", "prompts"]},
    "data/demo/dpo_en_demo.json": {"kinds": ["sft", "preference", "prompts"]},
    "data/demo/kto_en_demo.json": {"kinds": ["unpaired", "prompts"]},
    "data/demo/glaive_toolcall_en_demo.json": {"kinds": ["sft"]},
    "data/gsm8k/test.jsonl": {"kinds": ["sft", "prompts"], "facts": ["answer"]},
}


def project_of(folder: Path, source: dict[str, Any]) -> Path:
    """A project with one source of files, and a real tokenizer as its base."""
    project = new_project(folder)
    params = read_yaml(project / "params.yaml")
    params["sources"] = sources_of(files={"real": source | {"max_rows": ROWS, "on_unusable_row": "drop"}})
    write_yaml(project / "params.yaml", params)
    budgets = {"max_length": POSITIONS, "max_prompt_length": POSITIONS // 2, "on_unusable_row": "drop"}
    change(project / "params.yaml", {"prepare_data": {"kinds": source["kinds"]} | HALF, "tokenize_data": budgets})
    tokenizer = AutoTokenizer.from_pretrained(real_file("tokenizers/smollm2-135m-instruct"))
    if "glaive" in source["path"]:
        tokenizer.chat_template = WITH_TOOLS
    tokenizer.save_pretrained(project / "models/base")
    config = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS}
    (project / "models/base/config.json").write_text(json.dumps(config), encoding="utf-8")
    return project


def shown_by(project: Path, kind: str, row: int, capsys: pytest.CaptureFixture) -> dict[str, str]:
    """What the preview shows of the tokens of each sort."""
    capsys.readouterr()
    with inside(project):
        preview_row.main(kind=kind, row=row)
    texts: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        sort, *rest = line.split(maxsplit=2)
        if sort in preview_row.STYLES and len(rest) == 2 and rest[0].isdigit():
            texts[sort] = texts.get(sort, "") + letters(rest[1])
    return texts


def letters(text: str) -> str:
    """What the preview shows of a text whatever its tokens: no bracket or space, and no character of several bytes."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return "".join(char for char in shown if char.isascii() and char not in BRACKETS_AND_SPACE)


def said(kind: str, row: dict[str, Any]) -> dict[str, list[str]]:
    """The texts of a prepared row that the preview must show, by sort of tokens."""
    if kind == "sft":
        replies = [message for message in row["messages"] if message["role"] == "assistant"]
        calls = [call["function"]["name"] for reply in replies for call in reply.get("tool_calls", [])]
        return {"trained": [*(reply["content"] for reply in replies), *calls]}
    texts = {"prompt": [row["prompt"][-1]["content"]]}
    return texts | {sort: [row[sort][0]["content"]] for sort in ("chosen", "rejected", "completion") if sort in row}


@pytest.mark.parametrize("file", FILES)
def test_a_real_file_goes_through_all_stages_of_data(tmp_path, capsys, file):
    project = project_of(tmp_path, {"path": str(real_file(file).resolve())} | FILES[file])
    rows_read, _, _ = read(project, "real")
    prepared, _ = prepare(project)
    for kind in FILES[file]["kinds"]:
        assert len([row for row in rows_read if row["kind"] == kind]) > 0.9 * ROWS
        call(project, f"tokenize_data@{kind}")
        path = project / "data/tokens"
        tables = {split: read_table(path / split / f"{kind}.arrow", ENCODINGS[kind].schema) for split in SPLITS}
        kept = {split: list(table["row"][:]) for split, table in tables.items()}
        assert kept == {split: [*range(len(prepared[f"{split}/{kind}"]))] for split in SPLITS}
        assert sum(map(len, kept.values())) > 0.8 * ROWS
        for row in kept["train"][:PREVIEWED]:
            shown = shown_by(project, kind, row, capsys)
            for sort, texts in said(kind, prepared[f"train/{kind}"][row]).items():
                assert [text for text in texts if letters(text) not in shown[sort]] == []
