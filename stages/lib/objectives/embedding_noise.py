"""NEFTune (arXiv 2310.05914, Algorithm 1): uniform noise on the embeddings of training rows, as a regulariser."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from stages.lib.compute.batching import SequenceBatch
from stages.lib.objectives.objective import Rows


class EmbeddingNoise:
    """ε α / sqrt(L d) on every embedding of a row of L tokens, padding left out, with ε uniform in [-1, 1).

    The draws belong to (seed, step, place of the row in the step), so neither micro-batches nor processes nor a resume
    change them. They are made on the CPU, on every device the same.

    Args:
        embeddings: what turns token ids (b, t) into the (b, t, d) that a model reads.
        alpha: α.
    """

    def __init__(self, embeddings: nn.Module, alpha: float, seed: int) -> None:
        self.embeddings = embeddings
        self.alpha = alpha
        self.seed = seed

    @contextmanager
    def added(self, batch: SequenceBatch, rows: Rows, step: int) -> Iterator[None]:
        """Within it a pass over `batch`, some of the `rows` of a step (0-based), reads embeddings with noise."""
        lengths = [len(rows["input_ids"][place]) for place in batch.rows]

        def add(_embeddings: nn.Module, _ids: object, found: torch.Tensor) -> torch.Tensor:
            noise = torch.zeros_like(found)
            flat = noise.flatten(0, 1)
            ends = batch.end_mask.flatten().nonzero().flatten().tolist()  # padded or packed, in the order of the rows
            for place, length, end in zip(batch.rows, lengths, ends, strict=True):
                own = self.of_row(step, place, length, found.shape[-1])
                flat[end - length + 1 : end + 1] = own.to(found)
            return found + noise

        hook = self.embeddings.register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()

    def of_row(self, step: int, place: int, length: int, width: int) -> torch.Tensor:
        """The noise of a row, float32, (length, width)."""
        # The counter's highest word tells rows apart, and from the draws of an epoch's order, which leave it at 0.
        bits = np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, place + 1])
        drawn = np.random.Generator(bits).random((length, width), dtype=np.float32)
        return torch.from_numpy((2 * drawn - 1) * np.float32(self.alpha / np.sqrt(length * width)))
