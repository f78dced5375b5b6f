"""Prediction by several processes: each draws its share of the particles, or predicts its share of the rows.

Particles are drawn by number, so that rank k's particles are those that one process would have drawn: N particles are
split into stretches that differ by one at most, whatever N and the number of ranks are. A predictive that draws none
(mean, linearised), or whose particles wait for each other (adaptive N), is split by rows. Every rank gets all answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scalabl.core import processes
from scalabl.predictive.base import Predictive, chosen
from scalabl.predictive.base import predict as predict_here
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.prefix import SharedPrefix
from scalabl.scoring.scorer import Scorer


def predict(
    scorer: Scorer,
    rows: Sequence[Encoded],
    predictive: Predictive,
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
    prefix: SharedPrefix | None = None,
) -> Tensor:
    """`scalabl.predictive.predict` with the work split over the ranks, all of which have to call it; (N, n, C) on each.

    In one process it is that function. The arguments are the same, and alike on every rank.
    """
    if processes.world_size() == 1:
        return predict_here(scorer, rows, predictive, batch_size=batch_size, advance=advance, prefix=prefix)
    predictive = chosen(predictive, scorer, rows, batch_size)
    if isinstance(predictive, MonteCarloPredictive):
        own = share(predictive.samples, processes.rank(), processes.world_size())
        part = torch.empty(0, len(rows), 0)
        if own:
            stretch = _Stretch(predictive, own)
            part = predict_here(scorer, rows, stretch, batch_size=batch_size, advance=advance, prefix=prefix)
        return torch.cat(_of_all_ranks(part, absent=-torch.inf))
    # longest first and in turn, so that every rank gets rows of every length
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    mine = order[processes.rank() :: processes.world_size()]
    part = torch.empty(0, 0, 0)
    if mine:
        several = None if advance is None else _Several(advance, len(rows))
        own_rows = [rows[i] for i in mine]
        part = predict_here(scorer, own_rows, predictive, batch_size=batch_size, advance=several, prefix=prefix)
    parts = _of_all_ranks(part, absent=-torch.inf)
    out = torch.full((parts[0].shape[0], len(rows), parts[0].shape[2]), -torch.inf)
    for rank, of_rank in enumerate(parts):
        if of_rank.shape[1]:  # more ranks than rows
            out[:, order[rank :: processes.world_size()]] = of_rank
    return out


def share(number: int, rank: int, count: int) -> range:
    """Rank's stretch of 0 .. number - 1: the stretches follow each other and differ by one at most."""
    return range(rank * number // count, (rank + 1) * number // count)


class _Stretch:
    """Some particles of a Monte Carlo predictive, by their numbers."""

    def __init__(self, inner: MonteCarloPredictive, particles: range) -> None:
        self.inner = inner
        self.particles = particles
        self.name = inner.name
        self.shares_prefix = inner.shares_prefix

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        return self.inner.draw(scorer, batch, self.particles.start, len(self.particles))

    # what a prefix has encoded is of particles by number: it holds for the next call with the same ones
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stretch) and (self.inner, self.particles) == (other.inner, other.particles)

    def __hash__(self) -> int:
        return hash((self.inner, self.particles))


class _Several:
    """Counts every row that this rank has done for all ranks, up to all rows."""

    def __init__(self, advance: Callable[[int], None], rows: int) -> None:
        self.advance = advance
        self.left = rows

    def __call__(self, done: int) -> None:
        counted = min(done * processes.world_size(), self.left)
        self.left -= counted
        self.advance(counted)


def _of_all_ranks(part: Tensor, *, absent: float) -> list[Tensor]:
    """Every rank's part (N_k, n_k, C_k), as (N_k, n_k, C) with the largest C, on the CPU.

    Args:
        part: this rank's, on the CPU.
        absent: what stands for choices that a rank's rows do not have.
    """
    from accelerate import PartialState
    from torch import distributed

    processes.connect()
    device = PartialState().device
    sizes = [torch.zeros(3, dtype=torch.long, device=device) for _ in range(processes.world_size())]
    distributed.all_gather(sizes, torch.tensor(part.shape, device=device))
    shapes = [tuple(size.tolist()) for size in sizes]
    largest = [max(shape[dim] for shape in shapes) for dim in range(3)]
    padded = torch.full(largest, absent, dtype=torch.float32)
    padded[: part.shape[0], : part.shape[1], : part.shape[2]] = part
    gathered = [torch.empty(largest, device=device) for _ in shapes]
    distributed.all_gather(gathered, padded.to(device))
    return [g[:particles, :rows].cpu() for g, (particles, rows, _) in zip(gathered, shapes, strict=True)]
