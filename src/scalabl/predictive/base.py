"""The interface of a predictive, and the loop over rows that all of them share, in one process or in several.

Several processes share a prediction: each draws its share of the particles, or predicts its share of the rows.
Particles are drawn by number, so that rank k's particles are those that one process would have drawn: N particles are
split into stretches that differ by one at most, whatever N and the world size are. A predictive that draws none (mean,
linearised), or whose particles wait for each other (adaptive N), is split by rows. Every rank gets all predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from scalabl.core import processes
from scalabl.core.modules import eval_mode
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.prefix import SharedPrefix, shared_prefix
from scalabl.scoring.scorer import Scorer, longest_first
from scalabl.tuner.threads import alone


class Predictive(Protocol):
    """A strategy: a scorer and a batch of B rows -> (N, B, C) log class probabilities, -inf for missing choices."""

    name: str
    # and, where a row may stand behind a prefix that was encoded once a particle: shares_prefix = True;
    # where it decides on the rows which other one predicts them: chosen(scorer, rows, batch_size=)

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor: ...


class MeanPredictive:
    """p(y | x, s_mu), N = 1: one pass with s at its posterior mean; for a plain LoRA simply its prediction."""

    name = "mean"
    shares_prefix = True

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        # outside training a stochastic layer is at its mean
        return scorer.class_log_probs(batch)[None]


@torch.inference_mode(False)  # a predictive may differentiate, whatever is around the call
def predict(
    scorer: Scorer,
    rows: Sequence[Encoded],
    predictive: Predictive,
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
    prefix: SharedPrefix | None = None,
    over_ranks: bool = False,
) -> Tensor:
    """Log class probabilities of all rows, (N, n, C) on the CPU, in the rows' order.

    Args:
        scorer: the model with its scoring.
        rows: the encoded rows.
        predictive: the strategy.
        batch_size: rows at a time; the answers do not depend on it.
        advance: called with the number of rows done, for a progress bar.
        prefix: what the rows begin with, kept from call to call; None looks for it in these rows.
        over_ranks: split the work over the processes, all of which have to call this with the same arguments.
    """

    def part(rows: Sequence[Encoded], predictive: Predictive, advance: Callable[[int], None] | None) -> Tensor:
        return _predict_here(scorer, rows, predictive, batch_size, advance, prefix)

    predictive = chosen(predictive, scorer, rows, batch_size)
    if not over_ranks or processes.world_size() == 1:
        return part(rows, predictive, advance)
    rank, world_size = processes.rank(), processes.world_size()
    if isinstance(predictive, MonteCarloPredictive):
        own = share(predictive.samples, rank, world_size)
        drawn = part(rows, _Stretch(predictive, own), advance) if own else torch.empty(0, len(rows), 0)
        return torch.cat(_of_all_ranks(drawn))
    # in turn, so that every rank gets rows of every length
    order = longest_first(rows)
    mine = [rows[i] for i in order[rank::world_size]]
    several = None if advance is None else _Several(advance, len(rows))
    parts = _of_all_ranks(part(mine, predictive, several) if mine else torch.empty(0, 0, 0))
    out = torch.full((parts[0].shape[0], len(rows), parts[0].shape[2]), -torch.inf)
    for number, of_rank in enumerate(parts):
        if of_rank.shape[1]:  # more ranks than rows
            out[:, order[number::world_size]] = of_rank
    return out


@torch.no_grad()
def _predict_here(
    scorer: Scorer,
    rows: Sequence[Encoded],
    predictive: Predictive,
    batch_size: int,
    advance: Callable[[int], None] | None,
    prefix: SharedPrefix | None,
) -> Tensor:
    classes = max(row.num_choices for row in rows)
    out: Tensor | None = None
    with alone(scorer.model), eval_mode(scorer.model):
        prefix = _prefix(scorer, rows, predictive, prefix)
        if prefix is not None:
            rows = [prefix.cut(row) for row in rows]
        for indices, chunk in scorer.batches(rows, batch_size):
            batch = scorer.with_trunk(replace(scorer.scoring.collate(chunk).to(scorer.device), prefix=prefix))
            log_probs = predictive(scorer, batch).float().cpu()
            classes = max(classes, log_probs.shape[-1])
            if out is None or out.shape[-1] < classes:
                wider = torch.full((log_probs.shape[0], len(rows), classes), -torch.inf)
                if out is not None:
                    wider[..., : out.shape[-1]] = out
                out = wider
            out[:, indices, : log_probs.shape[-1]] = log_probs
            if advance is not None:
                advance(len(indices))
    assert out is not None
    return out


def chosen(predictive: Predictive, scorer: Scorer, rows: Sequence[Encoded], batch_size: int) -> Predictive:
    """What predicts these rows: the predictive itself, or what it chooses for them (`auto`)."""
    choose = getattr(predictive, "chosen", None)
    made: Predictive = predictive if choose is None else choose(scorer, rows, batch_size=batch_size)
    return made


def _prefix(
    scorer: Scorer, rows: Sequence[Encoded], predictive: Predictive, kept: SharedPrefix | None
) -> SharedPrefix | None:
    """What the rows are cut behind: the prefix that was kept if all begin with it, else what these rows share."""
    if not getattr(predictive, "shares_prefix", False) or not scorer.reads_packed(rows):
        return None
    usable = kept is not None and scorer.shares_prefix is not False and all(kept.begins(row) for row in rows)
    prefix = kept if usable else shared_prefix(scorer, rows)
    if prefix is not None:
        prefix.claim(predictive, scorer.model)
    return prefix


def share(number: int, rank: int, world_size: int) -> range:
    """Rank's stretch of 0 .. number - 1: the stretches follow each other and differ by one at most."""
    return range(rank * number // world_size, (rank + 1) * number // world_size)


# equal where inner and particles are: what a prefix has encoded of particles by number holds for the next call
@dataclass(frozen=True)
class _Stretch:
    """Some particles of a Monte Carlo predictive, by their numbers."""

    inner: MonteCarloPredictive
    particles: range
    name = MonteCarloPredictive.name
    shares_prefix = MonteCarloPredictive.shares_prefix

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        return self.inner.draw(scorer, batch, self.particles.start, len(self.particles))


class _Several:
    """Counts every row that this rank has done for all ranks, up to all rows."""

    def __init__(self, advance: Callable[[int], None], rows: int) -> None:
        self.advance = advance
        self.left = rows

    def __call__(self, done: int) -> None:
        counted = min(done * processes.world_size(), self.left)
        self.left -= counted
        self.advance(counted)


def _of_all_ranks(part: Tensor) -> list[Tensor]:
    """Every rank's part (N_k, n_k, C_k) on the CPU, as (N_k, n_k, C) with the largest C, -inf where it had fewer."""
    processes.connect()
    device = PartialState().device
    sizes = [torch.zeros(3, dtype=torch.long, device=device) for _ in range(processes.world_size())]
    distributed.all_gather(sizes, torch.tensor(part.shape, device=device))
    shapes = [tuple(size.tolist()) for size in sizes]
    largest = [max(shape[dim] for shape in shapes) for dim in range(3)]
    padded = torch.full(largest, -torch.inf, dtype=torch.float32)
    padded[: part.shape[0], : part.shape[1], : part.shape[2]] = part
    gathered = [torch.empty(largest, device=device) for _ in shapes]
    distributed.all_gather(gathered, padded.to(device))
    return [g[:particles, :rows].cpu() for g, (particles, rows, _) in zip(gathered, shapes, strict=True)]
