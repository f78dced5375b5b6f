"""Sets of labels that hold the right one at a promised rate: split conformal prediction.

n held-out rows and the row to come are drawn alike (exchangeable: no shift), and V(x, c) says how little a label c
suits a row x. Then

    set(x) = {c : V(x, c) <= q},    q the ceil((n + 1) coverage)-th smallest of V(x_i, y_i)
    P(y in set(x)) >= coverage      on average over the held-out rows and the row to come

whatever the probabilities are worth: poor ones make sets large, not wrong. With a q of its own for every class, from
the rows of that class, the same holds within each class.

    lac     1 - p(c)                                        the smallest sets on average
    aps     sum of p over labels likelier than c, + u p(c)  of like coverage for easy rows and hard ones
    raps    aps + 0.01 max(0, rank(c) - 2)                  fewer unlikely labels in large sets

u in [0, 1) is one number a row. The likeliest label is always in a set: an empty one would say nothing, and a larger
set covers no less.

Sources: Vovk et al. 2005; Sadinle et al. 2019 (1609.00451) for LAC and classes; Romano et al. 2020 (2006.02544) for
APS; Angelopoulos et al. 2021 (2009.14193) for RAPS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scalabl.core.errors import UserError

SET_SCORES = ("lac", "aps", "raps")
PENALTY, FREE = 0.01, 2  # of raps: lambda, and the rank from which it counts (k_reg)
_ROUNDING = 1e-9  # 0.9 * 20 is above 18 by less


def rows_for_coverage(coverage: float) -> int:
    """The fewest held-out rows whose quantile is finite: ceil(1 / (1 - coverage)) - 1.

    Raises:
        UserError: a coverage outside (0, 1).
    """
    if not 0 < coverage < 1:
        raise UserError(f"The coverage is {coverage}; it must lie between 0 and 1, both left out.")
    return max(1, math.ceil(1 / (1 - coverage) - _ROUNDING) - 1)


def conformal_quantile(scores: ArrayLike, coverage: float) -> float:
    """The ceil((n + 1) coverage)-th smallest of n scores: a score drawn alike is at most this at that rate.

    Args:
        scores: (n,) of held-out rows.
        coverage: the rate, between 0 and 1.

    Raises:
        UserError: too few scores, NaN, or a coverage outside (0, 1).
    """
    values = np.sort(np.asarray(scores, dtype=np.float64))
    needed = rows_for_coverage(coverage)
    if len(values) < needed:
        raise UserError(
            f"A rate of {100 * coverage:.4g} % takes at least {needed} held-out rows, and there are {len(values)}; "
            "give more, or lower it."
        )
    if np.isnan(values).any():
        raise UserError("A score of a held-out row is NaN; check the predictions it was computed from.")
    return float(values[math.ceil((len(values) + 1) * coverage - _ROUNDING) - 1])


def label_scores(probs: ArrayLike, kind: str = "lac", u: ArrayLike | None = None) -> NDArray[np.float64]:
    """V(x, c) of n rows and C labels, (n, C); lower suits better.

    Args:
        probs: (n, C) class probabilities.
        kind: "lac", "aps" or "raps".
        u: (n,) of aps and raps, each in [0, 1]; None is 1, which is never too small and makes larger sets.

    Raises:
        UserError: no such kind.
    """
    p = np.asarray(probs, dtype=np.float64)
    if kind not in SET_SCORES:
        raise UserError(f"There is no score of sets {kind!r}; choose one of {', '.join(SET_SCORES)}.")
    if kind == "lac":
        return 1 - p
    order = np.argsort(-p, axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable") + 1
    through = np.take_along_axis(np.take_along_axis(p, order, axis=1).cumsum(axis=1), rank - 1, axis=1)
    share = np.ones(len(p)) if u is None else np.asarray(u, dtype=np.float64)
    found: NDArray[np.float64] = through - (1 - share)[:, None] * p
    return found + PENALTY * np.maximum(0, rank - FREE) if kind == "raps" else found


def set_thresholds(
    scores: ArrayLike, labels: ArrayLike, coverage: float, *, classes: Sequence[str] | None = None
) -> tuple[float, ...]:
    """q from held-out rows: one for all classes, or one a class.

    Args:
        scores: (n, C) of `label_scores`.
        labels: (n,) the right ones.
        coverage: the promised rate, between 0 and 1.
        classes: the names of the C classes, for a q of each; None for one q.

    Raises:
        UserError: too few rows, of all or of a class.
    """
    right = np.asarray(labels)
    of_right = np.take_along_axis(np.asarray(scores, dtype=np.float64), right[:, None], axis=1)[:, 0]
    if classes is None:
        return (conformal_quantile(of_right, coverage),)
    require_of_each(np.bincount(right, minlength=len(classes)).tolist(), classes, coverage)
    return tuple(conformal_quantile(of_right[right == c], coverage) for c in range(len(classes)))


def require_of_each(counts: Sequence[int], classes: Sequence[str], coverage: float) -> None:
    """Refuse classes with too few held-out rows for a threshold of their own.

    Raises:
        UserError: the sentence names the class with the fewest, and how many it takes.
    """
    needed = rows_for_coverage(coverage)
    fewest = min(range(len(classes)), key=lambda c: counts[c])
    if counts[fewest] < needed:
        raise UserError(
            f"A coverage of {100 * coverage:.4g} % within each class takes at least {needed} held-out rows of each, "
            f"and {classes[fewest]!r} has {counts[fewest]}; give more, lower the coverage, or leave out per_class."
        )


def label_sets(probs: ArrayLike, scores: ArrayLike, thresholds: Sequence[float]) -> NDArray[np.bool_]:
    """Which labels are in the sets of n rows, (n, C); the likeliest label always is.

    Args:
        probs: (n, C) class probabilities.
        scores: (n, C) of `label_scores`.
        thresholds: of `set_thresholds`.
    """
    p = np.asarray(probs, dtype=np.float64)
    inside: NDArray[np.bool_] = np.asarray(scores) <= np.asarray(thresholds)
    inside[np.arange(len(p)), p.argmax(axis=1)] = True
    return inside
