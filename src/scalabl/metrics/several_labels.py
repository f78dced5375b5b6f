"""Rows that may have several labels, or none: a row with a label is a question that is answered no or yes.

All other metrics are of such questions: probabilities (n C, 2) and answers (n C,) of n rows and C labels, a row's
questions behind each other. What is about a row as a whole stands in this file: is the set of its labels right, and how
good are these sets over rows and labels. Intervals are over rows, since a row's questions are no independent ones.

    subset accuracy   share of rows whose labels are all right and none missing
    micro-F1          2 TP / (2 TP + FP + FN) of all questions together
    macro-F1          the mean over labels of each label's F1; one that no row has and none is given is left out

A label is given where its probability is above 1/2.

Source: Tsoumakas et al. 2010 (Mining multi-label data, section 7.1).
"""

from __future__ import annotations

from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics.bootstrap import Metric, check_settings, judged
from scalabl.metrics.uncertainty import average

SET_METRICS: dict[str, bool] = {"subset_accuracy": True, "micro_f1": True, "macro_f1": True}
"""The metrics of a row's labels together, and whether higher is better."""


def label_probs(log_probs: Tensor, per_row: int = 1) -> Tensor:
    """The averaged probabilities (n, C) of n rows: of one label out of C, or of each label to be there.

    Args:
        log_probs: (N, n, C) of N particles; of several labels a row (N, n C, 2).
        per_row: questions a row, C of several labels.
    """
    probs = average(log_probs)
    return probs if per_row == 1 else probs[:, 1].unflatten(0, (-1, per_row))


def wrong_rows(log_probs: Tensor, labels: Tensor, per_row: int = 1) -> Tensor:
    """(n,) whether any of a row's questions is answered wrongly; log_probs (N, n per_row, C), labels (n per_row,)."""
    wrong = average(log_probs).argmax(dim=1) != labels.cpu()
    return wrong.unflatten(0, (-1, per_row)).any(dim=1)


def evaluate_sets(
    probs: Tensor, marks: Tensor, *, bootstrap: int = 1000, seed: int = 0, confidence: float = 0.95
) -> dict[str, Metric]:
    """The `SET_METRICS` of rows, with bootstrap intervals over rows.

    Args:
        probs: (n, C) of each label to be there.
        marks: (n, C) 1 where a row has the label, else 0.
        bootstrap, seed, confidence: of the intervals; the same resamples as those of `evaluate`.

    Raises:
        UserError: shapes that differ, no rows, or settings out of range.
    """
    check_settings(bootstrap, confidence)
    if probs.ndim != 2 or probs.shape != marks.shape or not probs.numel():
        raise UserError(
            f"probs and marks must both have the shape (rows, labels), not {tuple(probs.shape)} and "
            f"{tuple(marks.shape)}; pass one of each for every label of every row."
        )
    given, there = probs.detach().cpu() > 0.5, marks.cpu() == 1
    exact = (given == there).all(dim=1).double()
    hits, either = 2 * (given & there).double(), given.double() + there.double()  # 2 TP, and 2 TP + FP + FN

    def subset_accuracy(counts: Tensor) -> Tensor:
        return counts @ exact / counts.sum(dim=1)

    def micro(counts: Tensor) -> Tensor:
        return (counts @ hits).sum(dim=1) / (counts @ either).sum(dim=1)

    def macro(counts: Tensor) -> Tensor:
        return ((counts @ hits) / (counts @ either)).nanmean(dim=1)

    figures = {"subset_accuracy": subset_accuracy, "micro_f1": micro, "macro_f1": macro}
    why = "no row has a label and none is given"
    undefined = {} if either.any() else {"micro_f1": why, "macro_f1": why}
    return judged(figures, len(exact), bootstrap, seed, confidence, dict.fromkeys(figures, (0, 1)), undefined)
