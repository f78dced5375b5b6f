"""How good and how calibrated a classifier is for each label that its rows share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scalabl.metrics.bootstrap import check_settings
from scalabl.metrics.scores import checked, gap_by_bin


@dataclass(frozen=True)
class ClassFigures:
    """Of one label c among n rows.

    Attributes:
        support: rows whose label it is.
        precision: share of the rows answered with c whose label it is; None where none is.
        recall: share of the rows of c that are answered with it; None where there are none.
        ece: sum_b n_b / n |share of c - mean p(c | x)| over bins of p(c | x), all rows [class-wise, Kull et al. 2019].
    """

    support: int
    precision: float | None
    recall: float | None
    ece: float


def per_class(probs: Tensor, labels: Tensor, num_bins: int = 15) -> list[ClassFigures]:
    """The figures of each of C labels, from probs (n, C) and labels (n,).

    Raises:
        UserError: as `evaluate`.
    """
    check_settings(num_bins=num_bins)
    probs, labels = checked(probs, labels)
    answers = probs.argmax(dim=1)
    return [_figures(p, labels == c, answers == c, num_bins) for c, p in enumerate(probs.unbind(dim=1))]


def per_label(probs: Tensor, marks: Tensor, num_bins: int = 15) -> list[ClassFigures]:
    """The figures of each of C labels of rows that may have several; a row is given those above 1/2.

    Args:
        probs: (n, C) of each label to be there.
        marks: (n, C) 1 where a row has the label, else 0.
        num_bins: of the calibration error.
    """
    check_settings(num_bins=num_bins)
    columns = zip(probs.double().unbind(dim=1), (marks == 1).unbind(dim=1), strict=True)
    return [_figures(p, there, p > 0.5, num_bins) for p, there in columns]


def _figures(probs: Tensor, of_class: Tensor, answered: Tensor, num_bins: int) -> ClassFigures:
    """Of one label: its probabilities, which rows have it and which are answered with it, (n,) each."""
    support, number, right = int(of_class.sum()), int(answered.sum()), int((of_class & answered).sum())
    gaps = gap_by_bin(probs.contiguous(), of_class.double(), num_bins).sum(dim=0)
    precision, recall = right / number if number else None, right / support if support else None
    return ClassFigures(support, precision, recall, gaps.abs().sum().item() / len(probs))
