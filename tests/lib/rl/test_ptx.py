"""Supervised rows in a policy's update: their gradient and the order they come in."""

from typing import Any

import pytest
import torch

from stages.lib.compute.batching import epoch_order
from stages.lib.compute.engine.torch import TorchEngine
from stages.lib.compute.processes import Processes
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.objectives.sft import SftObjective
from stages.lib.rl.ptx import Ptx
from stages.lib.settings.ptx import PtxSettings
from tests.lib.rl.test_learner import OPTIMIZER, PLAIN_TORCH
from tests.tiny_models import CPU, batching, tiny_llama

ROWS = [([3, 4, 9, 1], [0, 0, 1, 1]), ([5, 10, 11, 12, 1], [0, 1, 1, 1, 1]), ([6, 7, 8, 1], [0, 0, 0, 1])]


class Table:
    asked: list[list[int]]

    def __init__(self) -> None:
        self.asked = []

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, rows: list[int]) -> dict[str, Any]:
        self.asked.append(rows)
        return {"input_ids": [ROWS[row][0] for row in rows], "loss_mask": [ROWS[row][1] for row in rows]}


def mixed(budget: int = 1000) -> tuple[Ptx, Table, TorchEngine]:
    table = Table()
    module = TokenLogProbs(tiny_llama(1), with_entropies=True)
    engine = TorchEngine(module, OPTIMIZER, 8, PLAIN_TORCH, Processes(0, 1, CPU))
    return Ptx(table, SftObjective(batching(budget)), PtxSettings(coef=0.5, batch_size=2), 17), table, engine


@pytest.mark.parametrize("budget", [5, 1000])
def test_the_gradient_is_that_of_the_weighted_mean_over_tokens(budget: int) -> None:
    ptx, table, engine = mixed(budget)
    found = ptx.backward(engine)
    model = tiny_llama(1)
    total, count = torch.zeros(()), 0
    for ids, mask in (ROWS[row] for row in table.asked[0]):
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = [place for place, kept in enumerate(mask) if kept]
        total = total - sum(log_probs[place - 1, ids[place]] for place in places)
        count += len(places)
    (0.5 * total / count).backward()
    assert float(found["ptx/loss"]) == pytest.approx(total.item() / count, rel=1e-5)
    own = engine.module.language_model.lm_head.weight.grad
    torch.testing.assert_close(own, model.lm_head.weight.grad, atol=1e-5, rtol=1e-4)


def test_every_row_comes_once_in_an_epoch_and_a_repeated_step_reads_the_same() -> None:
    ptx, table, engine = mixed()
    for step in (0, 1, 2, 2):
        engine.steps_taken = step
        ptx.backward(engine)
    order = [int(row) for epoch in (0, 1) for row in epoch_order(3, 17, epoch)]
    assert table.asked == [order[:2], order[2:4], order[4:], order[4:]]
