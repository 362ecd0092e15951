"""Random rows through tiny and real tokenizers: ids decode to the text, one EOS ends them, masks cover the replies."""

from functools import cache
from itertools import groupby

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stages.lib.data.chat import render
from stages.lib.data.encoding import decode, special_tokens
from stages.lib.data.row_errors import UnusableRowError
from stages.lib.data.token_rows import ENCODINGS, OverBudgetError, encode_rows, within_budget
from stages.lib.settings.declaration import block
from stages.lib.settings.tokenize_data import Tokenize
from tests.lib.data.test_chat import CHAT_TEMPLATE, MARKED, assistant, tiny, user
from tests.lib.data.test_token_rows import BLOCKS, WITHOUT_EOS
from tests.real_files import real_file

REAL = ("models/stories260K", "tokenizers/gpt2", "tokenizers/smollm2-135m-instruct")
TEMPLATES = {"marked": MARKED, "without eos": WITHOUT_EOS, "blocks": BLOCKS, "project": CHAT_TEMPLATE, "own": None}
OF_TINY = [name for name in TEMPLATES if name not in ("own", "project")]  # the project's markers are no tokens there
CASES = [("tiny", name) for name in OF_TINY] + [(real, name) for real in REAL for name in ("project", "own")]
QUICK = settings(
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    derandomize=True,
)


@cache
def tokenizer_of(name, template):
    if name == "tiny":
        return tiny(TEMPLATES[template])
    tokenizer = AutoTokenizer.from_pretrained(real_file(name))
    if template == "own" and tokenizer.chat_template is None:
        pytest.skip(f"{name} has no chat template of its own")
    if template != "own":
        tokenizer.chat_template = TEMPLATES[template]
        tokenizer.add_tokens(["<|system|>", "<|user|>", "<|assistant|>"], special_tokens=True)
    return tokenizer


def texts(name):
    """Of letters that the tiny tokenizer knows; for a real one of anything that Unicode's first plane holds.

    Above it the SmolLM2 tokenizer lacks bytes, and such rows are dropped.
    """
    letters = st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"])
    letters = st.sampled_from("hio \né") if name == "tiny" else letters
    return st.text(letters, min_size=1, max_size=12).filter(str.strip)


def talks(name):
    """Conversations of one to three replies."""
    return st.lists(st.tuples(texts(name), texts(name)), min_size=1, max_size=3).map(
        lambda pairs: [message for asked, answer in pairs for message in (user(asked), assistant(answer))]
    )


def section(**changes):
    return Tokenize(**(block(Tokenize) | {"max_length": 10_000, "max_prompt_length": 5_000} | changes))


def encoded(tokenizer, kind, row, **changes):
    read = ENCODINGS[kind].read({"source": "drawn", **row}, "here")
    (result,) = encode_rows(tokenizer, kind, [read], section(**changes))
    if isinstance(result, UnusableRowError):
        assume(False)  # a special token spelled out, or a character that the tokenizer changes
    if isinstance(result, Exception):
        raise result
    return result, read


def as_encoded(tokenizer, text):
    swallowed = special_tokens(tokenizer).swallowed
    return swallowed.sub("", text) if swallowed else text


def runs(table):
    """What is trained, and what is not, in turn: (trained, ids)."""
    pairs = zip(table["loss_mask"], table["input_ids"], strict=True)
    return [(learnt, [token for _, token in part]) for learnt, part in groupby(pairs, key=lambda pair: pair[0])]


@pytest.mark.parametrize(("name", "template"), CASES)
@pytest.mark.parametrize("loss_on", ["all_replies", "last_reply"])
def test_ids_of_a_conversation(name, template, loss_on):
    tokenizer = tokenizer_of(name, template)
    eos = tokenizer.eos_token_id

    @QUICK
    @given(talks(name))
    def holds(talk):
        result, read = encoded(tokenizer, "sft", {"messages": talk}, loss_on=loss_on)
        table = ENCODINGS["sft"].columns(result, read)
        ids = table["input_ids"]
        # One EOS at the end, and the ids are those of the text that the template writes.
        assert ids[-1] == eos
        assert ids[-2] != eos
        whole = render(tokenizer, talk, add_generation_prompt=False)
        text = "".join(decode(tokenizer, part) for _, part in runs(table))
        assert without_end(tokenizer, text) == without_end(tokenizer, as_encoded(tokenizer, whole))
        # What is trained is the replies that were asked for, each whole, with the end that the template writes.
        learnt = [part for is_learnt, part in runs(table) if is_learnt]
        replies = [message["content"] for message in talk if message["role"] == "assistant"]
        expected = replies if loss_on == "all_replies" else replies[-1:]
        assert len(learnt) == len(expected)
        for part, reply in zip(learnt, expected, strict=True):
            assert decode(tokenizer, part).replace(tokenizer.eos_token, "").strip() == reply.strip()
            assert part.count(eos) == (part is learnt[-1] or template != "without eos")
            assert eos not in part[:-1]

    holds()


def without_end(tokenizer, text):
    """A text up to the end of its last reply: EOS and white space come after it, as a template likes."""
    return text.rstrip().removesuffix(tokenizer.eos_token).rstrip()


@pytest.mark.parametrize(("name", "template"), CASES)
def test_ids_of_a_pair(name, template):
    tokenizer = tokenizer_of(name, template)

    @QUICK
    @given(talks(name), texts(name))
    def holds(talk, other):
        row = {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": [assistant(other)]}
        result, _ = encoded(tokenizer, "preference", row)
        start = as_encoded(tokenizer, render(tokenizer, talk[:-1], add_generation_prompt=True))
        assert decode(tokenizer, result.prompt) == start
        for reply, text in zip(result.replies, (talk[-1]["content"], other), strict=True):
            assert reply.ids[-1] == tokenizer.eos_token_id
            assert tokenizer.eos_token_id not in reply.ids[:-1]
            assert decode(tokenizer, reply.ids[:-1]).strip() == text.strip()

    holds()


@pytest.mark.parametrize(("name", "template"), CASES)
def test_ids_of_a_whole_text(name, template):
    tokenizer = tokenizer_of(name, template)

    @QUICK
    @given(texts(name))
    def holds(text):
        result, read = encoded(tokenizer, "sft", {"text": text})
        table = ENCODINGS["sft"].columns(result, read)
        *ids, end = table["input_ids"]
        assert table["loss_mask"] == [False] + [True] * len(ids)
        if name == "models/stories260K":  # the only one here that puts BOS before plain text
            first, *ids = ids
            assert first == tokenizer.bos_token_id == 1
        assert (decode(tokenizer, ids), end) == (text, tokenizer.eos_token_id)

    holds()


LENGTHS = st.integers(min_value=2, max_value=40)


@QUICK
@given(talks("tiny"), LENGTHS, LENGTHS, st.one_of(st.none(), LENGTHS), st.sampled_from(["keep_end", "keep_start"]))
def test_no_cut_eats_a_reply_unasked(talk, most, of_prompt, of_reply, truncation):
    assume(of_prompt < most and (of_reply is None or of_reply <= most))
    tokenizer = tokenizer_of("tiny", "marked")
    whole, _ = encoded(tokenizer, "sft", {"messages": talk})
    budgets = {"max_length": most, "max_prompt_length": of_prompt, "max_completion_length": of_reply}
    for cut_replies in (False, True):
        try:
            row = within_budget(whole, section(**budgets, truncation=truncation, cut_replies=cut_replies))
        except OverBudgetError:
            assert not cut_replies
            assert len(whole.replies[0].ids) + 1 > min(most, of_reply + 1 if of_reply else most)
            continue
        prompt, reply = row.prompt, row.replies[0].ids
        assert 1 <= len(prompt) <= of_prompt
        assert 1 <= len(reply) <= (of_reply or most)
        assert len(prompt) + len(reply) <= most
        ends = whole.prompt[-len(prompt) :], whole.prompt[: len(prompt)]
        assert prompt == ends[truncation == "keep_start"]
        assert row.prompt_is_cut == (len(prompt) < len(whole.prompt))
        if cut_replies:
            assert reply == whole.replies[0].ids[: len(reply)]
            assert row.reply_is_cut or reply == whole.replies[0].ids
            assert len(reply) - 1 not in [place for others in whole.replies[0].untrained for place in others]
        else:
            assert reply == whole.replies[0].ids
