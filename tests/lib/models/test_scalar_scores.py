"""Scores of sequences and tokens, against the classifier of transformers on one unpadded sequence at a time."""

import pytest
import torch

from stages.lib.compute.batching import SequenceBatch
from stages.lib.models.scalar_scores import SequenceScores, TokenScores
from tests.tiny_models import PAD, batching, tiny_classifier

SEQUENCES = [[3, 4, 5, 1], [6, 1], [7, 8, 9, 10, 11]]


def batch_of(sequences: list[list[int]], *, packing: bool = False) -> SequenceBatch:
    masks = [[0] * len(sequence) for sequence in sequences]
    (batch,) = batching(1000, packing).masked(sequences, masks)
    return batch


@pytest.mark.parametrize("packing", [False, True])
def test_a_score_is_read_at_the_last_token_of_each_sequence(packing: bool) -> None:
    model = tiny_classifier()
    alone = [float(model(torch.tensor([sequence])).logits.detach()) for sequence in SEQUENCES]
    batch = batch_of(SEQUENCES, packing=packing)
    scores = SequenceScores(model)(*batch.inputs, batch.end_mask).tolist()
    assert scores == pytest.approx([alone[row] for row in batch.rows], abs=1e-5)


def test_a_pad_id_inside_a_sequence_is_a_token_like_any_other() -> None:
    scorer = SequenceScores(tiny_classifier())
    longer, shorter = batch_of([[3, PAD]]), batch_of([[3]])
    one, other = (scorer(*batch.inputs, batch.end_mask).item() for batch in (longer, shorter))
    assert one != pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_the_score_at_a_token_is_that_of_the_sequence_cut_there(packing: bool) -> None:
    model = tiny_classifier()
    batch = batch_of(SEQUENCES, packing=packing)
    scores = TokenScores(model)(*batch.inputs).flatten()
    ends = batch.end_mask.flatten().nonzero().flatten().tolist()
    for row, end in zip(batch.rows, ends, strict=True):
        sequence = SEQUENCES[row]
        for cut in range(1, len(sequence) + 1):
            wanted = model(torch.tensor([sequence[:cut]])).logits.item()
            assert scores[end - len(sequence) + cut].item() == pytest.approx(wanted, abs=1e-5)


def test_the_head_computes_in_float32_on_bfloat16_weights() -> None:
    model = tiny_classifier().bfloat16()
    batch = batch_of(SEQUENCES)
    hidden = model.model(batch.input_ids).last_hidden_state
    scores = TokenScores(model)(*batch.inputs)
    assert scores.dtype == torch.float32
    wanted = hidden.float() @ model.score.weight.float()[0]
    assert torch.allclose(scores[0], wanted[0], atol=1e-3)
