"""What a row of a token table looks like, on a terminal and elsewhere."""

import contextlib
import json

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from stages.lib.command.errors import StageError
from stages.tools.preview_row import main, preview_lines
from tests.lib.data.test_chat import assistant, tiny, user
from tests.stages.test_tokenize_data import CONFIG, PAIR, PROMPT, RATED, tokenize_here

TALK = {"messages": [user("h"), assistant("ho"), user("i\n"), assistant("o")]}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    tiny().save_pretrained(folder / "models/base")
    (folder / "models/base/config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 20}))
    base, budgets = folder / "models/base", {"max_length": 20, "max_prompt_length": 12, "truncation": "drop"}
    tokenize_here(folder, base, "sft", [{"messages": [user("<u>"), assistant("o")]}, TALK], **budgets)
    tokenize_here(folder, base, "preference", [{**PAIR, "margin": 0.5}], **budgets)
    tokenize_here(folder, base, "unpaired", [RATED, RATED | {"prompt": [user("h")], "label": False}], **budgets)
    tokenize_here(folder, base, "prompts", [{**PROMPT, "facts": {"a": "\x1b[31m"}}], **budgets)
    return folder


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            {"kind": "sft", "row": 1},
            [
                "data/tokens/train/sft.arrow, row 1 (source films): 11 tokens",
                'messages: [{"content": "h", "role": "user"}]',
                "[prompt]  {trained}  (masked)",
                "prompt      3  [<u>][h][<a>]",
                "trained     2  {ho}{<eos>}",
                "masked      4  (<u>)(i)(\\n)(<a>)",
                "trained     2  {o}{<eos>}",
            ],
        ),
        (
            {"kind": "preference"},
            [
                "data/tokens/train/preference.arrow, row 0 (source films): 8 tokens",
                "margin: 0.5",
                "[prompt]  {chosen}  <rejected>",
                "prompt       4  [<u>][h][i][<a>]",
                "chosen       2  {ho}{<eos>}",
                "rejected     2  <o><<eos>>",
            ],
        ),
        (
            {"kind": "unpaired", "split": "test"},  # of one row, beside which no other reply can stand
            [
                "data/tokens/test/unpaired.arrow, row 0 (source films): 6 tokens",
                "label: True",
                "[prompt]  {completion}",
                "prompt         4  [<u>][h][i][<a>]",
                "completion     2  {ho}{<eos>}",
            ],
        ),
        (
            {"kind": "unpaired", "row": 1},
            [
                "data/tokens/train/unpaired.arrow, row 1 (source films): 7 tokens",
                "label: False",
                "[prompt]  {completion}  (mismatched)",
                "prompt         3  [<u>][h][<a>]",
                "completion     2  {ho}{<eos>}",
                "mismatched     2  (ho)(<eos>)",
            ],
        ),
        (
            {"kind": "prompts"},
            [
                "data/tokens/train/prompts.arrow, row 0 (source films): 4 tokens",
                'messages: [{"content": "hi", "role": "user"}]',
                'facts: {"a": "\\u001b[31m"}',
                "[prompt]",
                "prompt     4  [<u>][h][i][<a>]",
            ],
        ),
    ],
)
def test_each_kind(project, capsys, options, lines):
    with contextlib.chdir(project):
        main(**options)
    assert capsys.readouterr().out.splitlines() == lines


def test_on_a_terminal_tokens_have_colours_in_turn():
    row = {"input_ids": [2, 4, 5], "loss_mask": [False, True, True]}
    assert list(preview_lines(tiny(), row, coloured=True)) == [
        "\x1b[38;5;255;48;5;24mprompt\x1b[0m  \x1b[38;5;255;48;5;22mtrained\x1b[0m",
        "prompt      1  \x1b[38;5;255;48;5;24m<u>\x1b[0m",
        "trained     2  \x1b[38;5;255;48;5;22mh\x1b[0m\x1b[38;5;255;48;5;28mi\x1b[0m",
    ]


def test_spaces_of_sentencepiece_are_shown():
    """What is said of ids one by one would be without them: its decoder takes a space from every beginning."""
    pieces = ["<s>", "</s>", "▁once", "▁", "▁a", "il", "<0xC3>", "<0xA9>", "."]
    backend = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    row = {"input_ids": [0, 2, 3, 4, 5, 6, 7, 4, 8, 1], "loss_mask": [False] * 4 + [True] * 6}
    _, prompt, trained = preview_lines(tokenizer, row, coloured=False)
    assert prompt == "prompt      4  [<s>][once][ ][ a]"
    assert trained == "trained     6  {il}{<0xC3>}{<0xA9>}{ a}{.}{</s>}"
    row = {"prompt_ids": [4, 5], "chosen_ids": [4, 1], "rejected_ids": [4, 8, 1]}
    assert [*preview_lines(tokenizer, row, coloured=False)][2:] == [
        "chosen       2  { a}{</s>}",
        "rejected     3  < a><.><</s>>",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sft", "row": 0}, r"sft\.arrow has no row 0: the first is 1 \(it has 1, up to 1\)"),
        ({"kind": "sft", "row": 7}, r"has no row 7: it was dropped, or is beyond the last \(it has 1, up to 1\)"),
        ({"kind": "chat"}, "--kind chat: expected one of sft, preference, unpaired, prompts"),
        ({"kind": "sft", "split": "eval"}, "--split eval: expected one of train, validation, test"),
    ],
)
def test_a_row_that_is_not_there(project, options, message):
    with contextlib.chdir(project), pytest.raises(StageError, match=message):
        main(**options)
