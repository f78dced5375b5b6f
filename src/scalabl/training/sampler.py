"""The order of training rows: rows of like length share a batch, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGroupedOrder(Sampler[int]):
    """A seeded shuffle whose batches hold rows of like length; the order depends on (seed, epoch) alone.

    Rows are shuffled, cut into stretches of 50 batches, and sorted by length within each stretch; the batches of
    an epoch are then shuffled. A resumed run meets the same order, whatever random numbers were drawn before.

    Args:
        lengths: tokens of each row.
        batch_size: rows of an optimiser step on all devices.
        seed: of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        stretch = 50 * self.batch_size
        rows: list[int] = []
        for start in range(0, len(order), stretch):
            rows += sorted(order[start : start + stretch], key=lambda i: self.lengths[i])
        groups = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # a last, smaller group stays last, where the data loader drops it
        whole, rest = [g for g in groups if len(g) == self.batch_size], [g for g in groups if len(g) < self.batch_size]
        for i in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[i]
        for group in rest:
            yield from group
