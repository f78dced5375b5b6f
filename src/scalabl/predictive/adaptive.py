"""When a row has enough particles: its answer after n of N is that of all N with a stated confidence.

The answer is the choice with the highest averaged probability, or none where that is below a threshold. It is open
while an average over all N particles could still fall on the other side of a comparison:

    best against every other choice   p_b - p_c > 0
    with a threshold                  p_b >= threshold, or p_c < threshold for all c

Of the wrong answers at most C are possible for the true one (C - 1 without a threshold), each by the failure of one
comparison: each is tested one-sided at (1 - confidence) / C [union bound], by

    mean - t_{n-1} s sqrt(1/n - 1/N) > 0

the prediction interval for the average of all N. It is exact for normal probabilities (residuals are independent of the
average, so that it does not matter that the average decides which choice is the true one [Basu 1955]); else an
approximation. Every look counts: the level is divided by their number [Bonferroni].

Adaptive N: particles in blocks, for the rows whose answer is not yet settled.
"""

from __future__ import annotations

import torch
from scipy.stats import t as student
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics.uncertainty import apply_temperature
from scalabl.predictive.base import Predictive
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.predictive.sampling import Sampling
from scalabl.scoring.base import Batch
from scalabl.scoring.scorer import Scorer


def settled(
    probs: Tensor,
    num_choices: Tensor,
    total: int,
    *,
    confidence: float,
    looks: int = 1,
    threshold: float | None = None,
) -> Tensor:
    """Whether the answer of each row is settled: (B,) bool.

    Args:
        probs: (n, B, C) class probabilities of the first n of N particles, 2 <= n; 0 for choices a row lacks.
        num_choices: (B,) how many choices each row has.
        total: N.
        confidence: that a row which is settled has the answer of all N particles; 1 settles nothing before N.
        looks: how often in all a row is looked at before N.
        threshold: abstain where the highest probability is below this; None never abstains.
    """
    if probs.shape[0] >= total:
        return torch.ones(probs.shape[1], dtype=torch.bool, device=probs.device)
    if confidence >= 1:
        return torch.zeros(probs.shape[1], dtype=torch.bool, device=probs.device)
    probs = probs.double()
    threshold = threshold or None  # a threshold of 0 never abstains
    average = probs.mean(dim=0)
    best = average.argmax(dim=-1, keepdim=True)  # (B, 1)
    lacks = torch.arange(probs.shape[-1], device=probs.device) >= num_choices[:, None]
    level = (1 - confidence) / (num_choices if threshold is not None else num_choices - 1).clamp_min(1)

    def above(values: Tensor) -> Tensor:
        """Whether values (n, B, K) average above 0 over all N particles: (B, K)."""
        return _t_lower(values, level[:, None] / looks, total) > 0

    leader = probs.gather(-1, best.expand(probs.shape[0], -1, 1))
    is_best = torch.zeros_like(lacks).scatter(1, best, True)
    leads = (above(leader - probs) | lacks | is_best).all(dim=-1)
    if threshold is None:
        return leads
    answers = above(leader - threshold)[:, 0]
    abstains = (above(threshold - probs) | lacks).all(dim=-1)
    return (leads & answers) | abstains


def _t_lower(values: Tensor, level: Tensor, total: int) -> Tensor:
    """(n, B, K) -> (B, K) the lower end of the one-sided prediction interval for the average of all N."""
    n = values.shape[0]
    quantile = torch.from_numpy(student.isf(level.cpu().numpy(), n - 1)).to(values)
    return values.mean(dim=0) - quantile * values.std(dim=0) * (1 / n - 1 / total) ** 0.5


class AdaptivePredictive:
    """A Monte Carlo predictive that stops early, row by row, when the answer cannot change at a stated confidence.

    A row that stops after n of N particles has the answer that all N would give it, with at least the confidence
    (`scalabl.predictive.adaptive` says on what that rests). Its particles are the first n of the inner predictive's;
    the others are -inf for all its choices, which `scalabl.metrics.uncertainty` leaves out of averages and counts
    (`particles_used`). Their disagreement, the epistemic part, is that of n particles: it comes out smaller by about
    1/n of itself.

    Args:
        inner: gives the particles; N is its number of samples.
        confidence: in (0, 1]; 1 draws all N for every row.
        threshold: the answer is the most probable choice, or none where its probability is below this; None for the
            choice alone.
        block: how many particles at a time, at least 2.
        temperature: T on the class logits of every particle: tempered ones settle an answer, and are returned.

    Raises:
        UserError: a setting is out of range, or the inner predictive's draws are not independent.
    """

    def __init__(
        self,
        inner: MonteCarloPredictive,
        confidence: float = 0.95,
        *,
        threshold: float | None = None,
        block: int = 4,
        temperature: float = 1.0,
    ) -> None:
        Sampling(inner.draws, confidence, threshold)  # refuses bad settings
        if block < 2:
            raise UserError(f"The block is {block}; it must be at least 2, one particle shows no spread.")
        self.inner = inner
        self.confidence = confidence
        self.threshold = threshold
        self.block = block
        self.temperature = temperature
        self.shares_prefix = inner.shares_prefix
        self.name = f"adaptive N ≤ {inner.samples}"

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        total = self.inner.samples
        batch = self.inner.begun(scorer, batch)  # what all particles share, once for all blocks
        rows = torch.arange(len(batch), device=batch.input_ids.device)
        choices = int(batch.num_choices.max())
        found: Tensor | None = None
        for first in range(0, total, self.block):
            number = min(self.block, total - first)
            drawn = self.inner.draw(scorer, batch.select(rows) if first else batch, first, number)
            if self.temperature != 1:
                drawn = apply_temperature(drawn, self.temperature)
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
            )
            rows = rows[~done]
            if len(rows) == 0:
                break
        assert found is not None
        return found


def with_sampling(predictive: Predictive, sampling: Sampling, temperature: float = 1.0) -> Predictive:
    """The same predictive with other draws, or with adaptive N, whose particles have the temperature.

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
            scale=inner.scale,
        )
    if sampling.confidence is not None:
        if not isinstance(predictive, MonteCarloPredictive):
            raise UserError("Adaptive N is for predictives that average over particles (mc); leave out --adaptive.")
        return AdaptivePredictive(
            predictive, sampling.confidence, threshold=sampling.threshold, temperature=temperature
        )
    return predictive
