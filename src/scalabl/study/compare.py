"""How sure a difference is: paired bootstrap over rows and seeds, and Student's interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import mean, stdev

import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics import scores
from scalabl.metrics.bootstrap import Metric, interval, resamples
from scalabl.metrics.figures import METRICS
from scalabl.metrics.scores import checked
from scalabl.study.results import Outcome

BOOTSTRAP = 1000
CONFIDENCE = 0.95
_BINS = 15


def paired_over_seeds(a: Mapping[int, Outcome], b: Mapping[int, Outcome], metric: str, *, seed: int = 0) -> Metric:
    """The mean over seeds of metric(a) - metric(b), with the interval of the paired bootstrap over rows and seeds.

    A resample draws rows, the same ones for both methods and all seeds, and seeds, the same ones for both methods.
    With three seeds an interval is narrower than it should be: three runs know little about a fourth.

    Args:
        a, b: seed -> what it said about the same rows; seeds that only one of them has are left out.
        metric: a name of `scalabl.metrics.METRICS`.
        seed: of the resamples.

    Raises:
        UserError: no seed in common, other rows, or no such metric.
    """
    if metric not in METRICS:
        raise UserError(f"there is no metric {metric!r}; choose from {', '.join(METRICS)}.")
    common = [s for s in a if s in b]
    if not common:
        raise UserError("the two methods have no seed in common; run both with the same seeds.")
    if not all(torch.equal(a[s].labels, b[s].labels) for s in common):
        raise UserError("the two methods were not tested on the same rows; test both on one data set.")
    value = mean(_score(a[s], metric) - _score(b[s], metric) for s in common)
    if math.isnan(value):
        return Metric(None, None, None, f"{metric} is undefined for one of the two methods")
    gaps = torch.stack([_draws(a[s], metric, seed) - _draws(b[s], metric, seed) for s in common])
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = torch.randint(len(common), (BOOTSTRAP, len(common)), generator=generator)
    return interval(value, gaps.T.gather(1, drawn).mean(dim=1), CONFIDENCE)


@lru_cache(maxsize=4096)
def _rows(outcome: Outcome) -> scores.Rows:
    return scores.Rows(*checked(outcome.probs, outcome.labels), _BINS)


@lru_cache(maxsize=32768)
def _draws(outcome: Outcome, metric: str, seed: int) -> Tensor:
    """(BOOTSTRAP,) the metric in each resample of the rows; the same resamples for every outcome of as many rows."""
    score = getattr(scores, metric)
    return torch.cat([score(_rows(outcome), counts) for counts in resamples(len(outcome.labels), BOOTSTRAP, seed)])


def _score(outcome: Outcome, metric: str) -> float:
    value = outcome.figures[metric]
    return math.nan if value is None else float(value)


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the 95 % interval of Student's t; no interval for one value."""
    if len(values) < 2:
        return values[0], None
    half = student_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values), half


@lru_cache
def student_quantile(p: float, freedom: int) -> float:
    """The quantile p > 1/2 of Student's t with whole degrees of freedom, by bisection of its distribution.

    P(|T| < t) is a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while (1 + _inside(high, freedom)) / 2 < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + _inside(middle, freedom)) / 2 < p else (low, middle)
    return high


def _inside(t: float, freedom: int) -> float:
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    # odd: cos + 2/3 cos^3 + 2 4/(3 5) cos^5 ...; even: 1 + 1/2 cos^2 + 1 3/(2 4) cos^4 ...; up to cos^(freedom - 2)
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
