"""Transformers' continuous batching as a sampler: its log-probs are the policy's, and so are its draws."""

import math
from collections import Counter

import torch

from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.samplers.continuous import ContinuousSampler
from stages.lib.rl.samplers.probe import furthest, policy_logps
from stages.lib.settings.declaration import block
from stages.lib.settings.sampler import TransformersSampling
from stages.lib.settings.train_grpo import TrainGrpo
from tests.lib.rl.samplers.policies import prompts_of
from tests.tiny_models import EOS, PAD, batching, tiny_llama

TEXTS = [[3, 4, 5, 6, 7], [8], [9, 10], [11, 12, 13]]


def test_responses_are_the_policys() -> None:
    model = tiny_llama()
    settings = TrainGrpo(**block(TrainGrpo, max_new_tokens=5, temperature=0.7, sampler=block(TransformersSampling)))
    budget = MemoryBudget("generation_batch_size", 6)
    sampler = ContinuousSampler(model, settings, 5, EOS, PAD, str, budget)
    episodes = sampler.sample(prompts_of(TEXTS), 0, 50)
    assert [(episode.prompt.row, episode.sample) for episode in episodes[48:52]] == [(0, 48), (0, 49), (1, 0), (1, 1)]
    ids = [episode.ids for episode in episodes]
    assert all(own.count(EOS) == episode.ended for own, episode in zip(ids, episodes, strict=True))
    assert all(len(own) == 5 or own[-1] == EOS for own in ids)
    ours = policy_logps(TokenLogProbs(model), [episode.prompt.ids for episode in episodes], ids, 0.7, batching(10**6))
    assert furthest([episode.engine_logps or [] for episode in episodes], ours) < 1e-4
    assert [episode.ids for episode in sampler.sample(prompts_of(TEXTS), 0, 50)] == ids
    assert [episode.ids for episode in sampler.sample(prompts_of(TEXTS), 1, 50)] != ids
    assert model.training  # as it was
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = (model(torch.tensor([TEXTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    counts = Counter(own[0] for own in ids[:50])
    for token, share in enumerate(expected.tolist()):  # within four standard errors
        assert abs(counts[token] / 50 - share) < 4 * math.sqrt(share * (1 - share) / 50) + 0.02
