"""Scores of sequences and tokens, against the classifier of transformers on one unpadded sequence at a time."""

from collections.abc import Callable

import pytest
import torch

from stages.lib.batching import pad_left, pad_right
from stages.lib.scalar_scores import SequenceScores, TokenScores
from tests.tiny_models import CPU, PAD, tiny_classifier

SEQUENCES = [[3, 4, 5, 1], [6, 1], [7, 8, 9, 10, 11]]


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_a_score_is_read_at_the_last_real_token(pad: Callable) -> None:
    model = tiny_classifier()
    alone = [float(model(torch.tensor([sequence])).logits.detach()) for sequence in SEQUENCES]
    assert SequenceScores(model)(*pad(SEQUENCES, PAD, CPU)).tolist() == pytest.approx(alone, abs=1e-5)


def test_a_pad_id_inside_a_sequence_is_a_token_like_any_other() -> None:
    model = tiny_classifier()
    ids, mask = pad_right([[3, PAD], [3, 4, 5]], PAD, CPU)
    shorter = SequenceScores(model)(*pad_right([[3]], PAD, CPU))
    assert SequenceScores(model)(ids, mask)[0].item() != pytest.approx(shorter.item(), abs=1e-4)


def test_the_score_at_a_token_is_that_of_the_sequence_cut_there() -> None:
    model = tiny_classifier()
    ids, mask = pad_right(SEQUENCES, PAD, CPU)
    scores = TokenScores(model)(ids, mask)
    for row, sequence in enumerate(SEQUENCES):
        for end in range(len(sequence)):
            cut = SequenceScores(model)(*pad_right([sequence[: end + 1]], PAD, CPU))
            assert scores[row, end].item() == pytest.approx(cut.item(), abs=1e-5)
