"""The curves behind the figures: reliability bins and risk against coverage."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from scalabl.metrics.bootstrap import check_settings
from scalabl.metrics.scores import Ranking, bin_of, checked


@dataclass(frozen=True)
class Bin:
    """Rows whose top-label confidence lies in [low, high) (the last bin: up to 1 inclusive).

    `confidence` and `accuracy` are means over the `count` rows; `accuracy_low` and `accuracy_high` are the
    ends of accuracy's Wilson interval. All four are None in an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None


def reliability(probs: Tensor, labels: Tensor, num_bins: int = 15, *, level: float = 0.95) -> list[Bin]:
    """The bins of the reliability diagram of probs (n, C) and labels (n,); ECE is their weighted mean gap.

    Intervals: Wilson 1927, at the confidence `level`.

    Raises:
        UserError: as `evaluate`.
    """
    check_settings(1, level, num_bins)
    probs, labels = checked(probs, labels)
    confidence, answer = probs.max(dim=1)
    correct, index = (answer == labels).double(), bin_of(confidence, num_bins)
    bins = []
    for b in range(num_bins):
        here, low, high = index == b, b / num_bins, (b + 1) / num_bins
        count = int(here.sum())
        if count == 0:
            bins.append(Bin(low, high, 0, None, None, None, None))
            continue
        mean, accuracy = confidence[here].mean().item(), correct[here].mean().item()
        bins.append(Bin(low, high, count, mean, accuracy, *_wilson(accuracy, count, level)))
    return bins


def risk_coverage(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Answer only the k = 1..n surest rows: coverage k / n and the expected share of errors, (n,) each.

    Among equally sure rows the expectation over their order is taken; the mean of the risks is AURC.

    Raises:
        UserError: as `evaluate`.
    """
    probs, labels = checked(probs, labels)
    confidence, answer = probs.max(dim=1)
    return risk_by_coverage(confidence, (answer != labels).double())


def risk_by_coverage(confidence: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """`risk_coverage` of any score: confidence (n,), higher is surer, and errors (n,) float64, 0 to 1 a row."""
    n = len(errors)
    ranking = Ranking(confidence)
    ends = ranking.ends
    through = errors[ranking.order].cumsum(0)
    place = torch.arange(n)
    group = torch.searchsorted(ends, place)  # the group of equally sure rows that each place lies in
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1] + 1])
    before = torch.cat([torch.zeros(1, dtype=torch.float64), through[ends[:-1]]])
    share = (place - starts[group] + 1).double() / (ends - starts + 1)[group]
    expected = before[group] + (through[ends] - before)[group] * share
    k = torch.arange(1, n + 1, dtype=torch.float64)
    return k / n, expected / k


def _wilson(share: float, count: int, level: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)
