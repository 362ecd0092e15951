"""Replies to held-out prompts: those of transformers' own greedy search, and nothing else that changes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn

from stages.lib.compute.processes import Processes
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.operations.greedy_replies import GreedyReplies, ShownReply, console_lines, prompts_in
from tests.tiny_models import CPU, EOS, PAD, VOCABULARY, tiny_gpt2, tiny_llama

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]


def replies_of(
    model: nn.Module,
    folder: Path,
    show: Callable[[int, Sequence[ShownReply]], None],
    policy: Any = None,
    **changed: Any,
) -> GreedyReplies:
    """Token 7 is the word t7."""
    path = folder / "tokenizer.json"
    vocabulary = {f"t{number}": number for number in range(VOCABULARY)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(path))
    words = {"eos_id": EOS, "positions": 64, "processes": Processes(0, 1, CPU)} | changed
    return GreedyReplies(
        policy or TokenLogProbs(model),
        model,
        {"prompt_ids": [*PROMPTS[:1], *PROMPTS, [12]]},
        3,
        path,
        **words,
        show=show,
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_they_are_those_of_greedy_search(make: Callable[..., nn.Module], seed: int, tmp_path: Path) -> None:
    model = make(seed)
    found = replies_of(model, tmp_path, lambda *_: None)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {
            "max_length": min(64, len(prompt) + 64),
            "do_sample": False,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
        assert found.reply(prompt) == expected.tolist()


def test_a_reply_ends_with_eos_or_where_the_positions_do(tmp_path: Path) -> None:
    def after(last: int, token: int) -> Any:
        """A policy that says 5 until `last` positions are read, and then `token`."""
        return lambda _ids, mask, *_, **__: nn.functional.one_hot(
            torch.tensor([token if mask.shape[1] >= last else 5]), VOCABULARY
        )

    model = tiny_llama()
    assert replies_of(model, tmp_path, print, after(5, EOS)).reply([3, 4]) == [5, 5, 5, EOS]
    assert replies_of(model, tmp_path, print, after(99, EOS), positions=6).reply([3, 4]) == [5, 5, 5, 5]
    assert len(replies_of(model, tmp_path, print, after(99, EOS), positions=None).reply([3, 4])) == 64


def test_nothing_else_changes(tmp_path: Path) -> None:
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random = torch.get_rng_state()
    shown: list[tuple[int, Sequence[ShownReply]]] = []
    replies_of(model, tmp_path, lambda *words: shown.append(words))(7)
    assert [step for step, _ in shown] == [7]
    assert [prompt for prompt, _ in shown[0][1]] == ["t3 t4 t5", "t6", "t7 t8 t9 t10 t11"]
    assert all(reply.split()[0][0] == "t" for _, reply in shown[0][1])
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_what_cannot_be_shown_is_told_once_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no cache\nhere")

    model = tiny_llama()
    replies = replies_of(model, tmp_path, print, broken)
    replies(1)
    replies(2)
    expected = "warning: no replies to held-out prompts are shown: NotImplementedError: no cache here\n"
    assert capsys.readouterr() == ("", expected)
    assert model.training


def test_a_prompt_ends_where_what_is_trained_begins() -> None:
    rows = {
        "input_ids": [[3, 4, 5, 6], [3, 4, 5, 6, 7], [3, 4]],
        "loss_mask": [[False, False, True, False], [False, True, True, True, True], [False, True]],
    }
    assert prompts_in(rows) == [[3, 4], [3, 4, 5], [3]]
    assert prompts_in({"prompt_ids": PROMPTS}) == PROMPTS


def test_a_line_shows_the_end_of_a_prompt() -> None:
    assert console_lines([ShownReply("a" * 200 + "\n", "b\n")]) == [f"    {'a' * 159 + chr(10)!r} -> 'b\\n'"]
