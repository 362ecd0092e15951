"""What a reward model reads where it is given text: a prompt and a reply to it, as the ids of the model's tokenizer.

One with a chat template gets the conversation rendered by it. One without gets plain text, with the special tokens that
its tokenizer puts around any text ([CLS], BOS, …): the contents of the messages and the reply, a line for each, and
the calls of tools as JSON.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.command.errors import StageError
from stages.lib.data.chat import NO_CONTEXT, Context, asked, render_all, rendered, require_fast, require_names
from stages.lib.data.conversations import Message
from stages.lib.data.template_process import RenderingResult, ToRender
from stages.lib.models.loading_errors import not_loaded
from stages.lib.models.model_facts import TOKENIZER_JSON, longest_sequence, read_config, require_json_objects

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 10**9  # transformers' model_max_length is far above where a tokenizer knows of no limit


class RewardTexts:
    """Encodes prompts with their replies for a reward model that has a tokenizer of its own.

    Raises:
        StageError: the folder has no tokenizer that can be used.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool) -> None:
        self.folder = folder
        self.tokenizer = load_any_tokenizer(folder, trust_remote_code=trust_remote_code)
        limits = [longest_sequence(read_config(folder), f"{folder}/config.json"), self.tokenizer.model_max_length]
        self.longest = min((limit for limit in limits if limit is not None and limit < UNLIMITED), default=None)

    @property
    def has_template(self) -> bool:
        return isinstance(self.tokenizer.chat_template, str)

    def encode(
        self,
        prompts: Sequence[Sequence[Message] | str],
        replies: Sequence[Message | str],
        contexts: Sequence[Context] | None = None,
    ) -> list[list[int]]:
        """Ids of each prompt (messages, or text that the reply goes on from) with its reply.

        Args:
            replies: messages, or the content of one.
            contexts: what the template gets beside the messages.
        Raises:
            StageError: the chat template refuses a conversation or leaves out the calls of a reply, or one is too long
                for the model.
        """
        asked_with = [NO_CONTEXT] * len(prompts) if contexts is None else contexts
        by_template = [self.has_template and not isinstance(prompt, str) for prompt in prompts]
        answers = [as_message(reply) for reply in replies]
        rows = [*zip(prompts, answers, asked_with, by_template, strict=True)]
        to_render = [conversation(prompt, reply, context) for prompt, reply, context, by in rows if by]
        results = render_all(self.tokenizer, to_render) if to_render else []
        texts = iter([self._text(result, asked.messages[-1]) for asked, result in zip(to_render, results, strict=True)])
        return [
            self._ids(next(texts) if by else plain_text(prompt, reply), plain=not by) for prompt, reply, _, by in rows
        ]

    def encode_query(self, text: str) -> list[int]:
        """Ids of a prompt and its reply that were rendered already, special tokens and all, as OpenRLHF sends them.

        A model with a chat template reads them with one EOS at their end, one without reads plain text. Raises
        StageError if it is too long for the model.
        """
        ends = [end for end in (self.tokenizer.pad_token, self.tokenizer.eos_token) if end]
        while any(text.endswith(end) for end in ends):
            text = text.removesuffix(ends[0]).removesuffix(ends[-1])
        if not self.has_template:
            return self._ids(text, plain=True)
        return self._ids(text + (self.tokenizer.eos_token or ""), plain=False)

    def _text(self, result: RenderingResult, reply: Message) -> str:
        text = rendered(result).text
        try:
            require_names(reply.get("tool_calls", ()), text, "the calls of tools")
        except StageError as error:
            raise StageError(f"{self.folder}: {error}") from None
        return text

    def _ids(self, text: str, *, plain: bool) -> list[int]:
        ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=plain).ids
        if self.longest is not None and len(ids) > self.longest:
            raise StageError(
                f"{self.folder} reads at most {self.longest} tokens of its own, and a prompt with its reply has "
                f"{len(ids)} (it begins {text[:60]!r}); use shorter prompts or replies, or another reward model"
            )
        return ids


def as_message(reply: Message | str) -> Message:
    """A reply of which only the content is known, as a message."""
    return {"role": "assistant", "content": reply} if isinstance(reply, str) else reply


def conversation(prompt: Sequence[Message] | str, reply: Message, context: Context) -> ToRender:
    """Messages with a reply, to be rendered."""
    assert not isinstance(prompt, str), "text is not rendered"
    return asked([*prompt, reply], context, add_generation_prompt=False)


def plain_text(prompt: Sequence[Message] | str, reply: Message) -> str:
    """A prompt and its reply without a template."""
    if isinstance(prompt, str):
        return prompt + said_in(reply)
    return "\n".join(map(said_in, [*prompt, reply]))


def said_in(message: Message) -> str:
    """The content of a message, with the tools that it calls, a line for each call."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([*([message["content"]] if message["content"] or not calls else []), *calls])


def load_any_tokenizer(folder: Path, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model from elsewhere, which need not have an EOS or a chat template."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    require_json_objects(folder, TOKENIZER_JSON)
    with not_loaded(f"{folder}: the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise StageError(f"{folder}: transformers finds no tokenizer in it")
    require_fast(tokenizer, str(folder))
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer
