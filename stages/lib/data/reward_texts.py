"""What a reward model reads where it is given text: a prompt and a reply to it, as the ids of the model's tokenizer.

One with a chat template gets the conversation rendered by it. One without gets plain text, with the special tokens that
its tokenizer puts around any text ([CLS], BOS, …): the contents of the messages and the reply, a line for each.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.command.errors import StageError
from stages.lib.data.chat import render, require_fast
from stages.lib.data.conversations import Message
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

    def encode(self, prompt: Sequence[Message] | str, reply: str) -> list[int]:
        """Ids of a prompt (messages, or text that the reply goes on from) and a reply.

        Raises:
            StageError: the chat template refuses the conversation, or it is too long for the model.
        """
        if isinstance(prompt, str) or not self.has_template:
            text = prompt + reply if isinstance(prompt, str) else "\n".join([*map(content_of, prompt), reply])
            ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=True).ids
        else:
            conversation: list[Message] = [*prompt, {"role": "assistant", "content": reply}]
            text = render(self.tokenizer, conversation, add_generation_prompt=False)
            ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if self.longest is not None and len(ids) > self.longest:
            raise StageError(
                f"{self.folder} reads at most {self.longest} tokens of its own, and a prompt with its reply has "
                f"{len(ids)} (it begins {text[:60]!r}); use shorter prompts or replies, or another reward model"
            )
        return ids


def content_of(message: Message) -> str:
    return message["content"]


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
