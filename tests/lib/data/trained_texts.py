"""What is trained of a prepared row, as text: encoded as by tokenize_data, a token a byte, with the plain template."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from stages.lib.data.encoding import decode
from stages.lib.data.prepared_rows import Kind
from stages.lib.data.token_rows import ENCODINGS, encode_rows, within_budget
from stages.lib.settings.declaration import block
from stages.lib.settings.prepare_base import NewModel
from stages.lib.settings.tokenize_data import Tokenize
from stages.prepare_base import train_tokenizer
from stages.tools.preview_row import token_runs
from tests.real_files import PROJECT

BYTES_AND_MARKERS = 256 + 5  # a token for each byte and each special one, so that every text can be encoded
NOT_TRAINED = ("prompt", "masked")
SETTINGS = Tokenize(**block(Tokenize, max_length=4096, max_prompt_length=2048))


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        corpus.write_text(json.dumps({"text": "Tea?"}), encoding="utf-8")
        made = train_tokenizer(corpus, NewModel(**block(NewModel, vocab_size=BYTES_AND_MARKERS)))
    made.chat_template = (PROJECT / "stages/chat_templates/chat.jinja").read_text(encoding="utf-8")
    return made


def trained_texts(kind: Kind, row: dict[str, Any]) -> list[tuple[str, str]]:
    """The runs of a row's tokens that are trained, and of a prompt all, each with its sort as preview_row names it.

    Raises StageError for a row that the template refuses.
    """
    encoding = ENCODINGS[kind]
    read = encoding.read({"source": "examples", **row}, "here")
    (encoded,) = encode_rows(tokenizer(), kind, [read], SETTINGS)
    if isinstance(encoded, Exception):
        raise encoded
    runs = token_runs(encoding.columns(within_budget(encoded, SETTINGS), read))
    return [(sort, decode(tokenizer(), ids)) for sort, ids in runs if kind == "prompts" or sort not in NOT_TRAINED]
