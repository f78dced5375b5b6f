"""Adaptive N: particles in blocks, for the rows whose decision is not yet settled."""

from __future__ import annotations

import torch
from torch import Tensor

from scalabl.errors import UserError
from scalabl.predictive.base import Predictive
from scalabl.predictive.drawn_layers import first_difference
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.predictive.stopping import settled
from scalabl.sampling import Sampling
from scalabl.scoring import Batch, Scorer


class AdaptivePredictive:
    """A Monte Carlo predictive that stops early, row by row, when the decision cannot change at a stated confidence.

    A row that stops after n of N particles has the decision that all N would give it, with at least the confidence
    (`scalabl.predictive.stopping` says on what that rests). Its particles are the first n of the inner predictive's;
    the others are -inf for all its choices, which `scalabl.uncertainty` leaves out of averages and counts
    (`particles_used`). Their disagreement, the epistemic part, is that of n particles: it comes out smaller by about
    1/n of itself.

    Args:
        inner: gives the particles; N is its number of samples.
        confidence: in (0, 1]; 1 draws all N for every row.
        threshold: the decision is the most probable choice, or to abstain where its probability is below this; None
            for the choice alone.
        bound: "t" or "betting".
        block: how many particles at a time, at least 2.

    Raises:
        UserError: a setting is out of range, or the inner predictive's draws are not independent.
    """

    def __init__(
        self,
        inner: MonteCarloPredictive,
        confidence: float = 0.95,
        *,
        threshold: float | None = None,
        bound: str = "t",
        block: int = 4,
    ) -> None:
        Sampling(inner.draws, confidence, threshold, bound)  # refuses bad settings
        if block < 2:
            raise UserError(f"The block is {block}; it must be at least 2, one particle shows no spread.")
        self.inner = inner
        self.confidence = confidence
        self.threshold = threshold
        self.bound = bound
        self.block = block
        self.shares_prefix = inner.shares_prefix
        self.name = f"adaptive N ≤ {inner.samples}"

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        # what all particles share, once for all blocks
        batch = scorer.with_trunk(batch, first_difference(scorer.model, self.inner.stochastic_layers))
        total = self.inner.samples
        batch = self.inner.begun(scorer, batch)
        rows = torch.arange(len(batch), device=batch.input_ids.device)
        choices = int(batch.num_choices.max())
        found: Tensor | None = None
        for first in range(0, total, self.block):
            number = min(self.block, total - first)
            drawn = self.inner.draw(scorer, batch.select(rows) if first else batch, first, number)
            if found is None:
                choices = max(choices, drawn.shape[-1])
                found = torch.full((total, len(batch), choices), -torch.inf, dtype=drawn.dtype, device=drawn.device)
            found[first : first + number, rows, : drawn.shape[-1]] = drawn
            done = settled(
                found[: first + number, rows].exp(),
                batch.num_choices[rows],
                total,
                confidence=self.confidence,
                looks=(total - 1) // self.block,
                threshold=self.threshold,
                bound=self.bound,
            )
            rows = rows[~done]
            if len(rows) == 0:
                break
        assert found is not None
        return found


def with_sampling(predictive: Predictive, sampling: Sampling) -> Predictive:
    """The same predictive with other draws, or with adaptive N.

    Raises:
        UserError: it draws no particles, or its draws are not of a ScalaBL posterior.
    """
    if sampling.draws != "independent":
        if type(predictive) is not MonteCarloPredictive:
            raise UserError(f"Only ScalaBL's mc predictive has {sampling.draws} draws; leave out --draws.")
        inner = predictive
        predictive = MonteCarloPredictive(
            inner.samples,
            seed=inner.seed,
            chunk=inner.chunk,
            draws=sampling.draws,
            stochastic_layers=inner.stochastic_layers,
        )
    if sampling.confidence is not None:
        if not isinstance(predictive, MonteCarloPredictive):
            raise UserError("Adaptive N is for predictives that average over particles (mc); leave out --adaptive.")
        return AdaptivePredictive(predictive, sampling.confidence, threshold=sampling.threshold, bound=sampling.bound)
    return predictive
