"""Rendering and encoding against ids worked out by hand, and round trips through real tokenizers."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stages.lib.command.errors import StageError
from stages.lib.data.chat import (
    decode_completion,
    encode_completion,
    encode_prompt,
    load_tokenizer,
    render,
)
from stages.lib.data.conversations import UnusableRowError
from tests.real_files import PROJECT, real_file

TINY_VOCABULARY = ["<pad>", "<eos>", "<u>", "<a>", "h", "i", "o", " ", "\n", "é", "ho", " h"]
PAD, EOS, USER, ASSISTANT, ID_H, ID_I, ID_O, SPACE, NEWLINE, E_ACUTE, HO, SPACE_H = range(12)
MARKED = (
    "{% for m in messages %}{{ {'user': '<u>', 'assistant': '<a>'}[m['role']] ~ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
LINE_BREAK = "{{ '\\n' }}"  # a bare one after a block would be trimmed
CHAT_TEMPLATE = (PROJECT / "stages/chat_templates/chat.jinja").read_text(encoding="utf-8")


def tiny(template=MARKED, normalizer=None, added=()):
    """A BPE tokenizer of twelve tokens with the merges h+o and space+h."""
    tokenizer = Tokenizer(
        models.BPE({token: index for index, token in enumerate(TINY_VOCABULARY)}, [("h", "o"), (" ", "h")])
    )
    tokenizer.decoder = decoders.Fuse()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<u>", "<a>"])
    if added:
        tokenizer.add_special_tokens(list(added))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = template
    return fast


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def test_a_conversation_by_hand():
    tokenizer = tiny()
    assert encode_prompt(tokenizer, [user("hi")]) == [USER, ID_H, ID_I, ASSISTANT]
    assert encode_completion(tokenizer, [user("hi")], assistant("oh ho")) == [ID_O, ID_H, SPACE, HO, EOS]
    prompt = [user("hi"), assistant("ho"), user("o")]
    assert encode_prompt(tokenizer, prompt) == [USER, ID_H, ID_I, ASSISTANT, HO, EOS, USER, ID_O, ASSISTANT]


def test_no_token_spans_prompt_and_reply():
    """Encoded as one text, the space that ends the prompt would join the reply's h: the mask would start one late."""
    tokenizer = tiny(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}o {% else %}{{ m['content'] }}<eos>"
        "{% endif %}{% endfor %}"
    )
    assert tokenizer.encode("io hi<eos>", add_special_tokens=False) == [ID_I, ID_O, SPACE_H, ID_I, EOS]
    assert encode_prompt(tokenizer, [user("i")]) == [ID_I, ID_O, SPACE]
    assert encode_completion(tokenizer, [user("i")], assistant("hi")) == [ID_H, ID_I, EOS]


@pytest.mark.parametrize(
    "ending",
    ["<eos>", "", LINE_BREAK, "<eos>" + LINE_BREAK, "<eos><eos>"],
    ids=["one", "none", "line break", "one and line break", "two"],
)
def test_exactly_one_eos_whatever_the_template_writes(ending):
    ids = encode_completion(tiny(MARKED.replace("<eos>", ending)), [user("hi")], assistant("oh"))
    assert ids == [ID_O, ID_H, EOS]


def test_text_of_the_template_around_a_reply_is_kept():
    template = MARKED.replace("<eos>", LINE_BREAK + "<eos>").replace("~ m", "~ ' ' ~ m")
    ids = encode_completion(tiny(template), [user("hi")], assistant("oi"))
    assert ids == [SPACE, ID_O, ID_I, NEWLINE, EOS]


def test_a_reply_keeps_its_own_white_space():
    assert encode_completion(tiny(), [user("hi")], assistant(" o\n")) == [SPACE, ID_O, NEWLINE, EOS]
    without_eos = tiny(MARKED.replace("<eos>", LINE_BREAK))
    assert encode_completion(without_eos, [user("hi")], assistant(" o\n")) == [SPACE, ID_O, NEWLINE, EOS]


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [("h<eos>", "o"), ("hi<a>oh", "o"), ("h", "i<eos>o"), ("h", "<pad>")],
)
def test_the_text_of_a_special_token_makes_a_row_unusable(prompt, reply):
    with pytest.raises(UnusableRowError, match=r"^special_token_in_text$"):
        encode_completion(tiny(), [user(prompt)], assistant(reply))


def test_an_added_token_that_is_not_special_is_text():
    tokenizer = tiny()
    tokenizer.add_tokens(["<think>"])
    assert encode_completion(tokenizer, [user("h")], assistant("<think>o")) == [12, ID_O, EOS]


def test_text_that_does_not_come_back_makes_a_row_unusable():
    with pytest.raises(UnusableRowError, match=r"^not_reversible$"):  # z is no token, and is left out
        encode_prompt(tiny(), [user("hiz")])
    with pytest.raises(UnusableRowError, match=r"^not_reversible$"):
        encode_completion(tiny(), [user("hi")], assistant("z"))


def test_unicode_composition_is_no_loss():
    tokenizer = tiny(normalizer=normalizers.NFC())
    assert encode_completion(tokenizer, [user("h")], assistant("e\u0301")) == [E_ACUTE, EOS]
    with pytest.raises(UnusableRowError, match=r"^not_reversible$"):  # but another normalisation is
        encode_prompt(tiny(normalizer=normalizers.Lowercase()), [user("Hi")])


def test_a_marker_that_swallows_white_space_is_no_loss():
    template = MARKED.replace("'<a>'", "'<m>\\n'").replace("<a>", "<m>" + LINE_BREAK)
    tokenizer = tiny(template, added=[AddedToken("<m>", rstrip=True)])
    assert encode_prompt(tokenizer, [user("hi")]) == [USER, ID_H, ID_I, 12]
    assert encode_completion(tokenizer, [user("hi")], assistant("oh")) == [ID_O, ID_H, EOS]


def test_a_template_whose_prompt_is_no_beginning_is_refused():
    """Here the prompt mentions how many messages follow, so it changes when the reply comes."""
    tokenizer = tiny("{{ 'h' * messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(StageError, match="does not render a prompt as a beginning"):
        encode_completion(tokenizer, [user("i")], assistant("o"))


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_template_that_leaves_out_a_message_of_a_prompt_is_refused(role):
    template = "{% for m in messages %}{% if m['role'] != '" + role + "' %}{{ m['content'] }}{% endif %}{% endfor %}oh"
    messages = [{"role": "system", "content": "hi"}, user("hoo")]
    with pytest.raises(StageError, match=f"leaves out a message of the {role} or changes it: '(hi|hoo)' gives"):
        encode_prompt(tiny(template), messages)


def test_a_template_may_trim_a_prompt_and_leave_out_of_an_earlier_reply_what_it_likes():
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] | trim }}{% endif %}{% endfor %}"
    assert encode_prompt(tiny(template), [user(" hi "), assistant("oh"), user("i")]) == [ID_H, ID_I, ID_I]


def test_a_template_that_writes_half_a_surrogate_pair_is_refused():
    with pytest.raises(StageError, match="the chat template writes half a surrogate pair"):
        encode_prompt(tiny("{{ '\\ud83c' }}"), [user("i")])


def test_a_template_that_leaves_out_the_reply_is_refused():
    tokenizer = tiny("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(StageError, match="leaves out a reply"):
        encode_completion(tokenizer, [user("i")], assistant("o"))


def test_a_template_writes_no_date_that_changes():
    date = "{{ strftime_now('%d %b %Y') }}"
    of_its_own = "\nho{% if strftime_now is defined %}" + date + "{% else %}oh{% endif %}" + MARKED
    assert render(tiny(of_its_own), [user("hi")], add_generation_prompt=True) == "\nhooh<u>hi<a>"
    with pytest.raises(StageError, match="'date_of_today' is undefined; tokens would be others tomorrow"):
        render(tiny(date + MARKED), [user("hi")], add_generation_prompt=True)


def test_decoding_stops_at_the_first_eos_and_hides_nothing_else():
    tokenizer = tiny()
    assert decode_completion(tokenizer, [ID_O, ID_H, EOS, ID_H, ID_I]) == "oh"
    assert decode_completion(tokenizer, [ID_O, USER, ID_H, PAD, PAD]) == "o<u>h"
    assert decode_completion(tokenizer, [EOS]) == decode_completion(tokenizer, []) == ""


def test_a_token_added_later_counts_as_special():
    tokenizer = tiny()
    assert encode_completion(tokenizer, [user("h")], assistant("o")) == [ID_O, EOS]
    tokenizer.add_tokens(["oh"], special_tokens=True)
    with pytest.raises(UnusableRowError, match=r"^special_token_in_text$"):
        encode_completion(tokenizer, [user("h")], assistant("oh"))


def test_a_folder_without_tokenizer_or_template_is_refused(tmp_path):
    with pytest.raises(StageError, match="is not a model folder"):
        load_tokenizer(tmp_path / "nowhere")
    tokenizer = tiny()
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(StageError, match="has no chat template"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(StageError, match=r"tokenizer\.json, line 1: not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(StageError, match="the tokenizer cannot be loaded: "):
        load_tokenizer(tmp_path)


# The project's template.


def test_the_projects_template_by_hand():
    tokenizer = tiny(CHAT_TEMPLATE)
    messages = [{"role": "system", "content": " s "}, user("h\n"), assistant("i"), user("o")]
    expected = "<|system|> s <|user|>h\n<|assistant|>i<eos><|user|>o"
    assert render(tokenizer, messages, add_generation_prompt=False) == expected
    assert render(tokenizer, messages, add_generation_prompt=True) == expected + "<|assistant|>"


def test_the_projects_template_starts_with_a_bos_of_its_own_only():
    tokenizer = tiny(CHAT_TEMPLATE)
    tokenizer.bos_token = "<u>"
    assert render(tokenizer, [user("h")], add_generation_prompt=False) == "<u><|user|>h"
    tokenizer.bos_token = "<eos>"  # GPT-2 has one token for both: a conversation does not begin with an end
    assert render(tokenizer, [user("h")], add_generation_prompt=False) == "<|user|>h"


def test_the_projects_template_refuses_an_unknown_role():
    with pytest.raises(StageError, match="unknown role 'robot': expected system, user or assistant"):
        encode_prompt(tiny(CHAT_TEMPLATE), [{"role": "robot", "content": "h"}])


# Real tokenizers.

TEXTS = [
    "Hello, world!",
    " a space before , and  two  inside ",
    "\n\nline breaks\n  and an indent\t",
    "naïve café — 日本語 🎬",
    "don't 12345 <b>it's</b>",
]


@pytest.fixture(scope="module", params=["models/stories260K", "tokenizers/gpt2", "tokenizers/smollm2-135m-instruct"])
def real_tokenizer(request):
    tokenizer = AutoTokenizer.from_pretrained(real_file(request.param))
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.add_tokens(["<|system|>", "<|user|>", "<|assistant|>"], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_real_tokenizers_give_a_text_back_exactly(real_tokenizer, text):
    prompt = [user(text), assistant(text), user("Go on.")]
    ids = encode_completion(real_tokenizer, prompt, assistant(text))
    assert ids.count(real_tokenizer.eos_token_id) == 1
    assert ids[-1] == real_tokenizer.eos_token_id
    assert decode_completion(real_tokenizer, ids) == text
    if real_tokenizer.chat_template != CHAT_TEMPLATE:
        return  # where a template puts a line break before a reply, an earlier reply's own may join it
    start = encode_prompt(real_tokenizer, prompt)
    assert encode_prompt(real_tokenizer, [*prompt, assistant(text), user("?")])[: len(start) + len(ids)] == start + ids


def test_gpt2_ids_are_the_published_ones():
    tokenizer = AutoTokenizer.from_pretrained(real_file("tokenizers/gpt2"))
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = encode_completion(tokenizer, [user("Hi")], assistant("Hello, world!"))
    assert ids == [15496, 11, 995, 0, 50256]


def test_a_sentencepiece_reply_starts_a_word():
    """Prompt and reply each start a piece, which this tokenizer begins with ▁; BOS comes once."""
    tokenizer = AutoTokenizer.from_pretrained(real_file("models/stories260K"))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    prompt = tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, [user("Once upon")]))
    reply = tokenizer.convert_ids_to_tokens(encode_completion(tokenizer, [user("Once upon")], assistant("a time")))
    assert prompt == ["<s>", "<|user|>", "▁Once", "▁upon", "<|assistant|>"]
    assert reply == ["▁a", "▁time", "</s>"]
    with pytest.raises(UnusableRowError, match=r"^not_reversible$"):  # its own sign for a space comes back as a space
        encode_prompt(tokenizer, [user("a▁b")])
