"""The metrics, each as a function of how often every row was drawn: counts (k, n) -> values (k,); and their curves.

With counts of one a metric is the ordinary figure; with resampled counts, the figure of each resample. Probabilities
and labels are checked before anything is computed from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, float64

from scalabl.core.errors import UserError
from scalabl.metrics.bootstrap import check_settings
from scalabl.metrics.uncertainty import SUM_TOLERANCE


def checked(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n, C) probabilities and (n,) labels -> the same as float64 and int64 on the CPU.

    Raises:
        UserError: for shapes that do not fit, no rows, NaN, negative probabilities, rows that do not sum to
            one, labels that are no whole numbers or lie outside the columns.
    """
    if probs.ndim != 2 or labels.ndim != 1 or probs.shape[0] != labels.shape[0]:
        raise UserError(
            f"probs must have the shape (rows, choices) and labels (rows,), not {tuple(probs.shape)} and "
            f"{tuple(labels.shape)}; pass one label for each row of probabilities."
        )
    if 0 in probs.shape:
        raise UserError("there are no rows to evaluate; pass at least one row with its label.")
    if labels.is_floating_point() or labels.is_complex():
        raise UserError(f"labels must be whole numbers, not {labels.dtype}; pass indices of choices.")
    probs, labels = probs.detach().to("cpu").to(float64), labels.detach().to("cpu").long()
    if not probs.isfinite().all():
        row = int((~probs.isfinite()).any(dim=1).nonzero()[0])
        raise UserError(f"the probabilities of row {row} hold NaN or infinity; check the model behind them.")
    sums = probs.sum(dim=1)
    wrong = ((sums - 1).abs() > SUM_TOLERANCE) | (probs < 0).any(dim=1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise UserError(
            f"row {row} is no probability distribution (lowest {probs[row].min().item():.4g}, sum "
            f"{sums[row].item():.4g}); pass probabilities, not logits or log-probabilities."
        )
    outside = (labels < 0) | (labels >= probs.shape[1])
    if outside.any():
        row = int(outside.nonzero()[0])
        raise UserError(
            f"the label {int(labels[row])} of row {row} is outside 0 to {probs.shape[1] - 1}; labels are "
            "indices of the columns of probs."
        )
    return probs, labels


class Rows:
    """What the metrics need of n rows, computed once: (n,) float64 each, and the gaps (n, num_bins) of ECE.

    Args:
        confidence: the probability of the answer.
        correct: 1 where it is right, else 0.
        nll: -log p(label) in nats.
        brier: sum_c (p_c - [c = label])^2.
        num_bins: of ECE.
    """

    def __init__(self, confidence: Tensor, correct: Tensor, nll: Tensor, brier: Tensor, num_bins: int) -> None:
        self.confidence, self.correct, self.nll, self.brier = confidence, correct, nll, brier
        self.gap = gap_by_bin(confidence, correct, num_bins)
        self.by_confidence = Ranking(confidence)

    @classmethod
    def of(cls, probs: Tensor, labels: Tensor, num_bins: int) -> Rows:
        """Of probs (n, C) float64 and labels (n,) int64, as `checked` gives them."""
        confidence, answer = probs.max(dim=1)
        # Kept above 0, or one impossible answer would make the whole figure infinite: 708 nats at most a row.
        label_prob = probs.gather(1, labels[:, None]).squeeze(1)
        nll = -label_prob.clamp(min=torch.finfo(torch.float64).tiny).log()
        # sum_c (p_c - y_c)^2 = sum_c p_c^2 - 2 p_label + 1: a choice that is missing (p = 0) adds nothing.
        brier = probs.square().sum(dim=1) - 2 * label_prob + 1
        return cls(confidence, (answer == labels).double(), nll, brier, num_bins)


class Ranking:
    """Rows by falling score, equal scores in one group: sums of any counts by group, sorted once."""

    def __init__(self, score: Tensor) -> None:
        ordered, self.order = score.sort(descending=True, stable=True)
        last = torch.ones_like(ordered, dtype=torch.bool)
        last[:-1] = ordered[1:] != ordered[:-1]
        self.ends = last.nonzero().squeeze(1)

    def through(self, counts: Tensor) -> Tensor:
        """counts (k, n) -> (k, groups): how many rows lie in this group or above it."""
        return counts[:, self.order].cumsum(dim=1)[:, self.ends]


def bin_of(confidence: Tensor, num_bins: int) -> Tensor:
    """The equal-width bin [b / num_bins, (b + 1) / num_bins) of each confidence; the last one takes 1 too."""
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    return (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, num_bins - 1)


def gap_by_bin(confidence: Tensor, correct: Tensor, num_bins: int) -> Tensor:
    """correct - confidence of n rows, (n, num_bins): each row's in the column of its bin, zeros elsewhere."""
    gap = torch.zeros(len(confidence), num_bins, dtype=torch.float64)
    gap[torch.arange(len(confidence)), bin_of(confidence, num_bins)] = correct - confidence
    return gap


def accuracy(rows: Rows, counts: Tensor) -> Tensor:
    """Share of rows whose most probable choice is right; of equal choices the first is the answer."""
    return counts @ rows.correct / counts.sum(dim=1)


def nll(rows: Rows, counts: Tensor) -> Tensor:
    """Mean of -log p(label), in nats."""
    return counts @ rows.nll / counts.sum(dim=1)


def brier(rows: Rows, counts: Tensor) -> Tensor:
    """Mean of sum_c (p_c - [c = label])^2 over all choices, 0 to 2 (Brier 1950, eq. 2)."""
    return counts @ rows.brier / counts.sum(dim=1)


def ece(rows: Rows, counts: Tensor) -> Tensor:
    """sum_b n_b / n |accuracy_b - confidence_b| over bins of top-label confidence (Guo et al. 2017)."""
    return calibration_error(rows.gap, counts)


def calibration_error(gap: Tensor, counts: Tensor) -> Tensor:
    """ECE of the gaps (n, num_bins) of `gap_by_bin`; counts (k, n)."""
    return (counts @ gap).abs().sum(dim=1) / counts.sum(dim=1)


def auroc(rows: Rows, counts: Tensor) -> Tensor:
    """P(a right answer is surer than a wrong one) + P(equal) / 2; NaN if all are right or all wrong."""
    return separation(rows.by_confidence, counts * rows.correct, counts * (1 - rows.correct))


def separation(ranking: Ranking, positives: Tensor, negatives: Tensor) -> Tensor:
    """Area under the ROC curve: P(positive scores above negative) + P(equal) / 2; counts (k, n) each."""
    return area_under(ranking.through(positives), ranking.through(negatives))


def area_under(above: Tensor, below: Tensor) -> Tensor:
    """`separation` of the positives and negatives (k, groups) through each group of equal scores, highest first."""
    num_positive, num_negative = above[:, -1], below[:, -1]
    negatives_here = below.diff(dim=1, prepend=torch.zeros_like(below[:, :1]))
    positives_here = above.diff(dim=1, prepend=torch.zeros_like(above[:, :1]))
    # For every group of negatives: the positives above it, and half of those beside it.
    wins = (negatives_here * (above - positives_here / 2)).sum(dim=1)
    return wins / (num_positive * num_negative)


def aurc(rows: Rows, counts: Tensor) -> Tensor:
    """Area under the risk-coverage curve, 1/n sum_k risk(k surest rows), 0 (best) to 1 (Geifman et al. 2019)."""
    return risk_area(rows.by_confidence, 1 - rows.correct, counts)


def risk_area(ranking: Ranking, errors: Tensor, counts: Tensor, fewest: int = 1) -> Tensor:
    """Mean over k = fewest..n of the risk of the k surest rows; errors (n,) from 0 to 1 a row, counts (k, n).

    Equally sure rows may be answered in any order; the area is the expectation over all of these orders. In
    a group of m rows with e errors that follows M surer rows with E errors, the j-th place has the expected
    risk (E + e j / m) / (M + j); summed over j = a+1..m with harmonic numbers H:
    E (H(M + m) - H(M + a)) + e / m (m - a - M (H(M + m) - H(M + a))).
    """
    n = int(counts[0].sum())
    steps = torch.arange(n + 1, dtype=torch.float64).clamp(min=1).reciprocal()
    harmonic = steps.cumsum(0) - 1  # H(0) = 0, H(1) = 1, ...
    through = ranking.through(counts)
    errors_through = ranking.through(counts * errors)
    size = through.diff(dim=1, prepend=torch.zeros_like(through[:, :1]))
    here = errors_through.diff(dim=1, prepend=torch.zeros_like(errors_through[:, :1]))
    before, errors_before = through - size, errors_through - here
    first = torch.minimum(before.clamp(min=fewest - 1), through)  # the places before it are not counted
    span = harmonic[through.long()] - harmonic[first.long()]
    area = errors_before * span + here / size.clamp(min=1) * (through - first - before * span)
    return area.sum(dim=1) / (n - fewest + 1)


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


def reliability(probs: Tensor, labels: Tensor, num_bins: int = 15) -> list[Bin]:
    """The bins of the reliability diagram of probs (n, C) and labels (n,); ECE is their weighted mean gap.

    Intervals: Wilson 1927, at the confidence 0.95.

    Raises:
        UserError: as `evaluate`.
    """
    check_settings(num_bins=num_bins)
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
        bins.append(Bin(low, high, count, mean, accuracy, *wilson(accuracy, count)))
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


def wilson(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share among so many rows (Wilson 1927), which has a width where the share is 0 or 1 too."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)
