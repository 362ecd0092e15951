"""Sampling: the distribution, the ends of responses, and that a response does not depend on the batch it is in."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import Prompt
from stages.lib.models import shared_prompts
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.rollouts import read_rollouts
from stages.lib.rl.samplers import own
from stages.lib.rl.samplers.own import OwnSampler
from stages.lib.settings.runtime import PassCost
from tests.tiny_models import CPU, EOS, PAD, VOCABULARY, batching, tiny_gpt2, tiny_llama

PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10], [11, 12, 13]]


def sampler(model: nn.Module, size: int = 4, **changed: Any) -> OwnSampler:
    options = {"seed": 5, "temperature": 1.0, "max_new_tokens": 12, "eos_id": EOS, "pad_id": PAD, "decode": str}
    options |= {"budget": MemoryBudget("generation_batch_size", size), "processes": Processes(0, 1, CPU)}
    options |= {"policy": TokenLogProbs(model), "language_model": model, "by_row": True}
    return OwnSampler(**(options | changed))


def prompts_of(ids: list[list[int]], rows: list[int]) -> list[Prompt]:
    return [Prompt(row, own, [], {}) for own, row in zip(ids, rows, strict=True)]


def sample(
    model: nn.Module, ids: list[list[int]], rows: list[int], samples: int = 1, **changed: Any
) -> list[list[int]]:
    episodes = sampler(model, **changed).sample(prompts_of(ids, rows), 2, samples)
    return [episode.ids for episode in episodes]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_response_does_not_depend_on_its_batch(make: Callable[[], nn.Module]) -> None:
    model = make()
    together = sample(model, PROMPTS, [0, 1, 2, 3])
    alone = [sample(model, [prompt], [row])[0] for row, prompt in enumerate(PROMPTS)]
    backwards = sample(model, PROMPTS[::-1], [3, 2, 1, 0], size=3)[::-1]
    assert together == alone == backwards
    assert len({tuple(response) for response in together}) > 1
    assert model.training  # as it was


def test_a_prompt_has_as_many_samples_as_wanted_and_they_differ() -> None:
    model = tiny_llama()
    single, several = sample(model, PROMPTS, [0, 1, 2, 3]), sample(model, PROMPTS, [0, 1, 2, 3], samples=3, size=5)
    assert several[::3] == single  # the first of each draws what it draws alone
    assert len({tuple(response) for response in several[:3]}) == 3
    episodes = sampler(model).sample(prompts_of(PROMPTS, [0, 1, 2, 3]), 2, 3)
    assert [(episode.prompt.row, episode.sample) for episode in episodes[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_a_prompt_that_comes_twice_is_answered_twice_unless_by_row() -> None:
    """A phase may span two epochs, and with them hold a row twice."""
    model = tiny_llama()
    first, second = sample(model, [[3, 4]] * 2, [7, 7], by_row=False)
    assert first != second
    first, second = sample(model, [[3, 4]] * 2, [7, 7], by_row=True)
    assert first == second


def test_greedy_responses_are_those_of_generate() -> None:
    model = tiny_llama().eval()
    for row, prompt in enumerate(PROMPTS):
        (ours,) = sample(model, [prompt], [row], temperature=0)
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
        assert ours == theirs


def test_a_response_ends_with_its_first_eos() -> None:
    episodes = sampler(tiny_llama(), max_new_tokens=30).sample(prompts_of(PROMPTS * 8, list(range(32))), 2)
    responses = [episode.ids for episode in episodes]
    assert any(episode.ended for episode in episodes)
    for episode in episodes:
        assert episode.ended == (EOS in episode.ids)
        assert len(episode.ids) == (episode.ids.index(EOS) + 1 if episode.ended else 30)
        assert episode.text == str(episode.ids)
        assert episode.policy_mask == [True] * len(episode.ids)
    assert not all(EOS in response for response in responses)


def test_tokens_come_as_often_as_the_distribution_says() -> None:
    model = tiny_llama()
    count = 4000
    first = [
        response[0] for response in sample(model, [[3, 4]] * count, list(range(count)), size=count, max_new_tokens=1)
    ]
    with torch.no_grad():
        probabilities = torch.softmax(model(torch.tensor([[3, 4]])).logits[0, -1], dim=-1)
    frequencies = Counter(first)
    for token, probability in enumerate(probabilities.tolist()):
        deviation = (probability * (1 - probability) / count) ** 0.5
        assert abs(frequencies[token] / count - probability) < 4.5 * deviation + 1e-9


def tiny_mistral() -> MistralForCausalLM:
    """With a window that the longer prompts of `PROMPTS` leave in 6 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "initializer_range": 0.4, "vocab_size": VOCABULARY, "sliding_window": 10}
    return MistralForCausalLM(MistralConfig(**sizes, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD))


@pytest.mark.parametrize(
    ("make", "new_tokens"), [(tiny_llama, 12), (tiny_gpt2, 6), (tiny_mistral, 5), (tiny_mistral, 6)]
)
def test_rows_behind_shared_prompts_say_what_rows_of_their_own_say(
    make: Callable[[], nn.Module], new_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in passes of their own, rows that leave, groups that shrink unevenly, more tokens than there is room."""
    model, asked = make(), (PROMPTS, [0, 1, 2, 3], 5)
    monkeypatch.setattr(shared_prompts, "PIECE", 2)
    found = sample(model, *asked, size=12, max_new_tokens=new_tokens, cost=CHEAP_PASSES)
    monkeypatch.setattr(own, "longest_behind_shared_prompts", lambda _: 0)
    assert found == sample(model, *asked, size=12, max_new_tokens=new_tokens)
    assert len({len(response) for response in found}) > 1 or new_tokens == 5


CHEAP_PASSES = PassCost(overhead=1, attention=10**9)


class Watched(TokenLogProbs):
    """Counts what its passes read."""

    def forward(self, *inputs: Any, run: str = "log_probs") -> Any:
        self.seen = [*getattr(self, "seen", []), (run, tuple(inputs[0].shape))]
        return super().forward(*inputs, run=run)


def test_a_prompt_is_read_once_without_padding_and_ended_rows_leave() -> None:
    model = tiny_llama()
    policy = Watched(model)
    watched = sampler(model, 20, policy=policy, max_new_tokens=20, cost=CHEAP_PASSES)
    lengths = [len(episode.ids) for episode in watched.sample(prompts_of(PROMPTS, [0, 1, 2, 3]), 2, 5)]
    prompts = [shape for run, shape in policy.seen if run == "prompt_logits"]
    assert prompts == [(1, 5), (1, 3), (1, 2), (1, 1)]
    rows = [shape[0] for run, shape in policy.seen if run == "next_logits"]
    assert len(rows) == max(lengths) - 1
    alive = [sum(length > place for length in lengths) for place in range(1, max(lengths))]
    assert all(own >= wanted for own, wanted in zip(rows, alive, strict=True))
    assert sum(rows) < 1.1 * sum(alive) < 0.85 * 20 * len(rows)


class OneOfTwo(Processes):
    """One of two processes that run one after the other: each goes on until the last token, as if the other had to."""

    def any(self, flag: bool) -> bool:  # noqa: ARG002 (the other process is not simulated)
        return True

    def gather_rows(self, own: Mapping[int, Any]) -> list[Any]:
        return [dict(own)]


@pytest.mark.parametrize("prompts", [4, 3, 1])
def test_two_processes_say_what_one_says(prompts: int) -> None:
    model, asked = tiny_llama(), prompts_of(PROMPTS[:prompts], [0, 1, 2, 3][:prompts])
    parts, shapes = {}, []
    for rank in (0, 1):
        policy = Watched(model)
        pair = sampler(model, 3, policy=policy, processes=OneOfTwo(rank, 2, CPU), cost=CHEAP_PASSES)
        draws = [[own.Draw(2 * place + n, one.ids, one.row, n) for n in (0, 1)] for place, one in enumerate(asked)]
        with torch.no_grad():
            (found,) = pair._responses(sorted(draws, key=lambda group: len(group[0].ids)), 2)
        parts |= found
        shapes.append([run for run, _ in policy.seen])
    assert [parts[place].ids for place in range(2 * prompts)] == sample(model, PROMPTS[:prompts], [*range(prompts)], 2)
    assert shapes[0] == shapes[1]  # as many passes, of the same kinds


def test_log_probs_that_were_kept_are_those_of_a_pass() -> None:
    model = tiny_llama()
    options = {"temperature": 0.7, "keeps_logps": True, "min_new_tokens": 3, "top_p": 0.8}
    episodes = sampler(model, 20, **options).sample(prompts_of(PROMPTS, [0, 1, 2, 3]), 2, 3)
    policy = TokenLogProbs(model, with_entropies=True)
    reused = read_rollouts(episodes, [0.0] * 12, lambda *_: pytest.fail("a pass"), None, None, 0.7, batching(100))
    passed = [episode._replace(engine_entropies=None) for episode in episodes]
    wanted = read_rollouts(passed, [0.0] * 12, policy, None, None, 0.7, batching(100))
    assert torch.allclose(reused.logps, wanted.logps, atol=1e-5)
    assert torch.allclose(reused.entropies, wanted.entropies, atol=1e-5)
    assert torch.equal(wanted.engine_logps, reused.logps)
    assert reused.logps.count_nonzero() == reused.response_mask.sum()


def test_no_response_ends_before_its_least_tokens() -> None:
    model = tiny_llama()
    free = sample(model, PROMPTS * 8, list(range(32)))
    bound = sample(model, PROMPTS * 8, list(range(32)), min_new_tokens=6)
    assert min(map(len, free)) < 6 <= min(map(len, bound))
    assert any(len(response) == 6 and response[-1] == EOS for response in bound)


def test_a_stop_string_ends_a_response_and_stays_in_it() -> None:
    model = tiny_llama()
    options = {"decode": lambda ids: "".join(f" {token}" for token in ids if token not in (EOS, PAD))}
    free = sampler(model, 32, **options).sample(prompts_of(PROMPTS * 8, list(range(32))), 2)
    stopped = sampler(model, 32, **options, stop_strings=(" 14", " 17 10")).sample(
        prompts_of(PROMPTS * 8, list(range(32))), 2
    )
    ends = 0
    for before, after in zip(free, stopped, strict=True):
        cuts = [place for place in range(len(before.ids)) if before.ids[place] == 14]
        cuts += [place + 1 for place in range(len(before.ids)) if before.ids[place : place + 2] == [17, 10]]
        wanted = before.ids[: min(cuts) + 1] if cuts else before.ids
        assert after.ids == wanted
        assert after.ended == (before.ended or bool(cuts))
        ends += bool(cuts)
    assert 3 < ends < 32
    late = sampler(model, 32, **options, stop_strings=(" 14",), min_new_tokens=4)
    episodes = late.sample(prompts_of(PROMPTS * 8, list(range(32))), 2)
    assert min(len(episode.ids) for episode in episodes) >= 4
    assert any(14 in episode.ids[:3] for episode in episodes)
