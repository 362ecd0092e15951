"""What a model as it stands answers to a few held-out prompts, for people to read while it trains.

Each reply takes the likeliest token every time, so no random number is drawn, and replies of two evaluations differ by
the weights alone.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from stages.lib.operations.tracker import ShownReply

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEW_TOKENS = 64
PROMPT_END = 160  # characters of a prompt that are shown, the last ones


class Launch(Protocol):
    """The processes of a launch."""

    @property
    def world_size(self) -> int: ...

    def any(self, condition: bool, /) -> bool:
        """Whether it holds in any process."""


class GreedyReplies:
    """Answers the prompts of a few rows whenever it is called; all processes call it together.

    Args:
        policy: a `TokenLogProbs` module or an engine around one.
        language_model: what that module holds.
        rows: columns of a token table.
        count: the first so many of their prompts that differ.
        tokenizer: the file tokenizer.json.
        eos_id: ends a reply.
        positions: of the model, None where it has no limit.
        show: gets the step (0-based) and the replies.
    """

    def __init__(
        self,
        policy: Callable[..., torch.Tensor],
        language_model: "PreTrainedModel",
        rows: Mapping[str, list[Any]],
        count: int,
        tokenizer: Path,
        eos_id: int,
        positions: int | None,
        processes: Launch,
        show: Callable[[int, Sequence[ShownReply]], None],
    ) -> None:
        self.policy = policy
        self.language_model = language_model
        self.prompts = distinct(prompts_in(rows))[:count]
        self.tokenizer = tokenizer
        self.eos_id = eos_id
        self.positions = positions
        self.processes = processes
        self.show = show

    def __call__(self, step: int) -> None:
        """Show the replies of the model after a step (0-based)."""
        if not self.prompts:
            return
        training = self.language_model.training
        self.language_model.eval()  # gradient checkpointing would drop the key-value cache
        try:
            replies = [self.reply(ids) for ids in self.prompts]
            self.show(step, self._as_text(replies))
        except Exception as error:  # what is there to be read shall not end a training
            if self.processes.world_size > 1:
                raise  # the others wait for this process
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            print(f"warning: no replies to held-out prompts are shown: {reason}", file=sys.stderr, flush=True)
            self.prompts = []
        finally:
            self.language_model.train(training)

    def _as_text(self, replies: list[list[int]]) -> list[ShownReply]:
        from tokenizers import Tokenizer

        text = Tokenizer.from_file(str(self.tokenizer))
        return [
            ShownReply(*(text.decode(ids, skip_special_tokens=False) for ids in pair))
            for pair in zip(self.prompts, replies, strict=True)
        ]

    @torch.no_grad()
    def reply(self, prompt: list[int]) -> list[int]:
        """The likeliest next token, again and again, up to the first EOS."""
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self.language_model.config)
        device = self.language_model.device
        ids = torch.tensor([prompt], device=device)
        found: list[int] = []
        for _ in range(self._room(prompt)):
            length = len(prompt) + len(found)
            mask = torch.ones((1, length), dtype=torch.bool, device=device)
            positions = torch.arange(length - ids.shape[1], length, device=device)[None]
            token = int(self.policy(ids, mask, positions, cache, run="next_logits").argmax())
            found.append(token)
            # All processes take as many passes as the one that goes on longest: ZeRO 3 gathers weights in each.
            if not self.processes.any(self.eos_id not in found):
                break
            ids = torch.tensor([[token]], device=device)
        return found[: found.index(self.eos_id) + 1] if self.eos_id in found else found

    def _room(self, prompt: list[int]) -> int:
        return NEW_TOKENS if self.positions is None else max(0, min(NEW_TOKENS, self.positions - len(prompt)))


def prompts_in(rows: Mapping[str, list[Any]]) -> list[list[int]]:
    """The prompts of rows of a token table; of a text that is trained on as a whole, its first half."""
    if "prompt_ids" in rows:
        return list(rows["prompt_ids"])
    prompts = []
    for ids, mask in zip(rows["input_ids"], rows["loss_mask"], strict=True):
        first = mask.index(True)
        prompts.append(ids[: first if first > 1 else (len(ids) + 1) // 2])
    return prompts


def distinct(prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt once: pairs of one prompt often follow each other."""
    return [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]


def console_lines(replies: Sequence[ShownReply]) -> list[str]:
    """A line for the console of each reply."""
    return [f"    {prompt[-PROMPT_END:]!r} -> {reply!r}" for prompt, reply in replies]
