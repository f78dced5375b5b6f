"""What `predictive.py` compares, and the rows that it is compared on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scalabl.data import Example
from scalabl.predictive import AutoPredictive, LinearizedPredictive, MeanPredictive, MonteCarloPredictive, Predictive
from scalabl.predictive.adaptive import AdaptivePredictive
from scalabl.scoring import Batch, Scorer


class Passes:
    """N particles one after the other, each a pass of its own."""

    name = "passes"

    def __init__(self, inner: MonteCarloPredictive) -> None:
        self.inner = inner

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        return torch.cat([self.inner.draw(scorer, batch, i, 1) for i in range(self.inner.samples)])


@dataclass(frozen=True)
class Strategy:
    """One line of the table.

    Attributes:
        name: as in the table.
        make: the predictive.
        trunk: whether what lies below the lowest stochastic layer is run once; else every layer for every particle.
        timed_as, judged_as: the strategy whose passes, or whose predictions, are the same.
    """

    name: str
    make: Callable[[], Predictive]
    trunk: bool = True
    timed_as: str | None = None
    judged_as: str | None = None


def strategies(samples: int, top: str) -> list[Strategy]:
    """All of them; `top`: the layers of the restricted linearisation, "last:K"."""
    mc, passes = f"mc, N = {samples}", f"mc, N = {samples}, {samples} passes"
    found = [
        Strategy("mean", MeanPredictive),
        Strategy(passes, lambda: Passes(MonteCarloPredictive(samples)), trunk=False, judged_as=mc),
        Strategy(f"{mc}, one batch", lambda: MonteCarloPredictive(samples), trunk=False, judged_as=mc),
        Strategy(mc, lambda: MonteCarloPredictive(samples)),
    ]
    for number in (4, 6):
        for kind in ("antithetic", "sobol", "moments"):
            found.append(
                Strategy(
                    f"{kind}, N = {number}",
                    lambda kind=kind, number=number: MonteCarloPredictive(number, draws=kind),  # type: ignore[misc]
                    timed_as=None if kind == "antithetic" else f"antithetic, N = {number}",
                )
            )
    return [
        *found,
        Strategy(f"adaptive, N ≤ {samples}", lambda: AdaptivePredictive(MonteCarloPredictive(samples))),
        Strategy("linearized", LinearizedPredictive),
        Strategy(f"linearized, s in {top}", lambda: LinearizedPredictive(stochastic_layers=top)),
        Strategy("auto", lambda: AutoPredictive(samples)),
    ]


def as_wide(row: Example, classes: int) -> Example:
    """The row with its right choice and so many others: entropies are compared between rows of like choices."""
    if len(row.choices) <= classes or row.answer is None:
        return row
    generator = random.Random(row.id)
    others = [i for i in range(len(row.choices)) if i != row.answer]
    kept = sorted([row.answer, *generator.sample(others, classes - 1)])
    return replace(row, choices=tuple(row.choices[i] for i in kept), answer=kept.index(row.answer))
