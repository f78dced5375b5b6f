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
    found = []
    for c in range(probs.shape[1]):
        of_class, answered = labels == c, answers == c
        support, number, right = int(of_class.sum()), int(answered.sum()), int((of_class & answered).sum())
        gaps = gap_by_bin(probs[:, c].contiguous(), of_class.double(), num_bins).sum(dim=0)
        precision, recall = right / number if number else None, right / support if support else None
        found.append(ClassFigures(support, precision, recall, gaps.abs().sum().item() / len(labels)))
    return found
