"""Which rows to answer: a threshold on confidence, chosen on held-out rows so that a promised error rate is kept.

A row is answered where its score lies above the threshold. Held-out rows and the rows to come are drawn alike and
independently (no shift), and nothing was fitted to the held-out rows that makes their errors rarer than usual. What
is then promised of a threshold t, alpha being the promised rate:

    exact       P( P(wrong | answered at t) <= alpha ) >= confidence      over the draw of the held-out rows
    conformal   E[ share of all rows, answered or not, that are answered wrongly ] <= alpha
                                                                          over that draw and the row to come

The first is about answered rows and holds with stated confidence; it also takes a score by which a higher threshold
has no higher error rate. The second needs exchangeability alone and fewer rows, but holds on average, and of 100 rows
of which 10 are answered, 5 of them wrongly, it counts 5 %. Neither speaks of a single row or outlives a shift.

Sources: Clopper and Pearson 1934; Geifman and El-Yaniv 2017 (selection with guaranteed risk, 1705.08500); Angelopoulos
et al. 2021 (learn then test, fixed-sequence testing, 2110.01052) and 2022 (conformal risk control, 2208.02814).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scalabl.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


SCORES = ("probability", "entropy", "epistemic")
GUARANTEES = ("exact", "conformal")
_ROUNDING = 1e-12  # 0.05 * 60 is above 3 by less


@dataclass(frozen=True)
class Threshold:
    """Where answers begin, and what is promised of them.

    Attributes:
        above: a row is answered where its score is above this; -inf answers every row, inf none.
        max_error: the promised rate.
        rows: the held-out rows.
        answered: how many of them lie above.
        wrong: how many of those are wrong.
        sentence: the promise in words, or why no row is answered.
        wanted: where none is, about how many held-out rows like these would show the rate; None where more would not.
        possible: likewise, the lowest rate in whole per cent that these rows could promise; None above a half.
    """

    above: float
    max_error: float
    rows: int
    answered: int
    wrong: int
    sentence: str
    wanted: int | None = None
    possible: float | None = None

    @property
    def abstains(self) -> bool:
        """Whether no row at all is answered."""
        return self.above == math.inf

    @property
    def coverage(self) -> float:
        """The share of held-out rows that are answered: what to expect of rows to come."""
        return self.answered / self.rows


def confidence_score(log_probs: Tensor, name: str = "probability", per_row: int = 1) -> NDArray[np.float64]:
    """log_probs (N, n, C) of N particles -> (n,), higher is surer.

    probability: the highest of the averaged prediction; entropy: minus its entropy, in nats; epistemic: minus the
    mutual information of answer and parameters, in nats. Of `per_row` questions a row (N, n per_row, C), as of several
    labels: the product of their highest probabilities, and sums.

    Raises:
        UserError: no such score; epistemic of a single particle, which is the same for every row.
    """
    from scalabl.metrics.uncertainty import average, decompose

    if name not in SCORES:
        raise UserError(f"there is no score {name!r}; choose one of {', '.join(SCORES)}.")
    if name == "probability":
        return np.asarray(average(log_probs).amax(dim=1).unflatten(0, (-1, per_row)).prod(dim=1))
    if name == "entropy":
        return np.asarray(-decompose(log_probs, per_row).total)
    if log_probs.shape[0] == 1:
        raise UserError("A single prediction has no epistemic part; take the score probability or entropy.")
    return np.asarray(-decompose(log_probs, per_row).epistemic)


def error_bound(wrong: ArrayLike, answered: ArrayLike, confidence: float = 0.95) -> NDArray[np.float64]:
    """The upper end of the one-sided exact interval of an error rate (Clopper and Pearson 1934).

    The largest rate at which so few errors still have a probability of 1 - confidence; 1 where all are wrong.

    Args:
        wrong: errors, 0 to answered; numbers or arrays of one shape.
        answered: rows, at least 1.
        confidence: between 0 and 1.
    """
    from scipy.special import betaincinv

    errors, rows = np.asarray(wrong, dtype=np.float64), np.asarray(answered, dtype=np.float64)
    # where all are wrong, Beta(n + 1, 0) is a point at 1
    bound: NDArray[np.float64] = betaincinv(errors + 1, np.maximum(rows - errors, 1), confidence)
    return np.where(errors >= rows, 1.0, bound)


def rows_needed(max_error: float, confidence: float = 0.95) -> int:
    """How many rows without an error show a rate of at most max_error: (1 - max_error)^n <= 1 - confidence."""
    _check(max_error, confidence)
    return max(1, math.ceil(math.log1p(-confidence) / math.log1p(-max_error) - _ROUNDING))


def rows_needed_on_average(max_error: float) -> int:
    """How many held-out rows the conformal guarantee takes: 1 / (n + 1) <= max_error."""
    _check(max_error)
    return max(1, math.ceil(1 / max_error - 1 - _ROUNDING))


def first_tested(rows: int, max_error: float, confidence: float = 0.95) -> int:
    """The number of surest rows at which the sequence of tests begins; it depends on the numbers given alone.

    Where half the promised rate would pass: a beginning at `rows_needed` would end at the first error among them.
    With fewer rows than that, `rows_needed`.
    """
    fewest = rows_needed(max_error, confidence)
    answered = np.arange(1, rows + 1)
    wrong = np.floor(max_error * answered / 2)
    passed = np.flatnonzero((wrong >= 1) & (error_bound(wrong, answered, confidence) <= max_error))
    return int(passed[0]) + 1 if passed.size else fewest


def exact_threshold(score: ArrayLike, wrong: ArrayLike, max_error: float, *, confidence: float = 0.95) -> Threshold:
    """The lowest threshold at which answered rows are shown to be wrong at no more than max_error.

    The k surest rows are tested one k after another, k = `first_tested` upwards: the rate among rows above the
    (k+1)-th score is refused to be above max_error by the exact binomial test at level 1 - confidence, until a test
    fails. The last k that passed decides. No level is shared between tests (fixed sequence): the first threshold
    whose rate is too high is passed with probability 1 - confidence at most, and behind it nothing is reached. For
    thresholds that are scores of the held-out rows this asks that a higher threshold has no higher error rate; rows of
    equal scores are answered together.

    Args:
        score: (n,) confidence of held-out rows, higher is surer.
        wrong: (n,) whether the answer is wrong.
        max_error: the promised rate among answered rows, between 0 and 1.
        confidence: of the promise, over the draw of the held-out rows.

    Returns:
        the threshold; it abstains on all rows, and says why, where no rate can be promised.

    Raises:
        UserError: no rows, NaN, shapes that differ, a rate or confidence outside (0, 1).
    """
    values, errors = _surest_first(score, wrong)
    needed = rows_needed(max_error, confidence)
    total = len(values)
    nothing = f"No row is answered: at most {_percent(max_error)} errors cannot be promised with confidence "
    nothing += f"{_percent(confidence)}; "
    if total < needed:
        why = f"that takes {needed} held-out rows without an error, and there are {total}."
        return Threshold(math.inf, max_error, total, 0, 0, nothing + why, wanted=needed)
    answered = np.arange(1, total + 1)
    between = np.append(values[:-1] > values[1:], True)  # a cut through equal scores is no threshold
    first = first_tested(total, max_error, confidence)
    tested = answered[between & (answered >= first)]
    passed = error_bound(errors[tested - 1], tested, confidence) <= max_error
    number = len(passed) if passed.all() else int(passed.argmin())
    if number == 0:
        why = f"{errors[tested[0] - 1]} of the {tested[0]} surest held-out rows are wrong."
        wanted, possible = (
            _rows_wanted(errors, max_error, confidence),
            _possible(errors, answered[between], max_error, confidence),
        )
        return Threshold(math.inf, max_error, total, 0, 0, nothing + why, wanted, possible)
    k = int(tested[number - 1])
    sentence = (
        f"At most {_percent(max_error)} of answered rows are wrong, with confidence {_percent(confidence)}, for rows "
        "drawn like the held-out ones (not under shift) and a score by which surer rows are not wrong more often."
    )
    return Threshold(float(values[k]) if k < total else -math.inf, max_error, total, k, int(errors[k - 1]), sentence)


def conformal_threshold(score: ArrayLike, wrong: ArrayLike, max_error: float) -> Threshold:
    """The lowest threshold with an expected share of wrongly answered rows, among all, of at most max_error.

    Conformal risk control of the loss 1{wrong and answered}, which falls as the threshold rises:
    t = inf{t : (n R(t) + 1) / (n + 1) <= alpha} with R the held-out share (Angelopoulos et al. 2022, eq. 4).

    Args:
        score: (n,) confidence of held-out rows, higher is surer.
        wrong: (n,) whether the answer is wrong.
        max_error: the promised share, between 0 and 1.

    Returns:
        the threshold; it abstains on all rows, and says why, where n + 1 < 1 / max_error.

    Raises:
        UserError: no rows, NaN, shapes that differ, a rate outside (0, 1).
    """
    _check(max_error)
    values, errors = _surest_first(score, wrong)
    total = len(values)
    allowed = math.floor(max_error * (total + 1) - 1 + _ROUNDING)
    if allowed < 0:
        sentence = f"No row is answered: to promise at most {_percent(max_error)} takes "
        sentence += f"{rows_needed_on_average(max_error)} held-out rows, "
        needed = rows_needed_on_average(max_error)
        return Threshold(math.inf, max_error, total, 0, 0, f"{sentence}and there are {total}.", wanted=needed)
    above = -math.inf
    if errors[-1] > allowed:
        above = float(values[int(np.searchsorted(errors, allowed + 1))])  # the score of the first error too many
    answered = int((values > above).sum())
    sentence = (
        f"At most {_percent(max_error)} of all rows, answered or not, are answered wrongly: on average over held-out "
        "and coming rows, for rows drawn like the held-out ones (not under shift)."
    )
    return Threshold(above, max_error, total, answered, int(errors[answered - 1]) if answered else 0, sentence)


_MORE = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # times as many rows as there are


def _rows_wanted(errors: NDArray[Any], max_error: float, confidence: float) -> int | None:
    """How many rows with the errors of these, (n,) counted among the surest 1..n, would pass the first test."""
    total = len(errors)
    for times in _MORE:
        surest = math.ceil(first_tested(times * total, max_error, confidence) / times)
        if surest <= total and error_bound(times * errors[surest - 1], times * surest, confidence) <= max_error:
            return times * total
    return None


def _possible(errors: NDArray[Any], cuts: NDArray[Any], max_error: float, confidence: float) -> float | None:
    """The first of rising rates, in per cent, that rows with these errors among the surest 1..n could promise; a
    threshold lies behind one of `cuts`."""
    for rate in np.arange(math.floor(100 * max_error) + 1, 51) / 100:
        tested = cuts[cuts >= first_tested(len(errors), rate, confidence)]
        if len(tested) and error_bound(errors[tested[0] - 1], tested[0], confidence) <= rate:
            return float(rate)
    return None


def _surest_first(score: ArrayLike, wrong: ArrayLike) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Scores in falling order, and how many errors there are among the first 1..n."""
    values, errors = np.asarray(score, dtype=np.float64), np.asarray(wrong)
    if values.ndim != 1 or values.shape != errors.shape or not len(values):
        raise UserError(
            f"scores and errors must both have the shape (rows,), not {values.shape} and {errors.shape}; pass one of "
            "each for every held-out row."
        )
    if np.isnan(values).any():
        raise UserError("a confidence score is NaN; check the predictions it was computed from.")
    order = np.argsort(-values, kind="stable")
    return values[order], errors.astype(bool)[order].cumsum()


def _check(max_error: float, confidence: float = 0.5) -> None:
    for name, value in (("max_error", max_error), ("confidence", confidence)):
        if not 0 < value < 1:
            raise UserError(f"{name} is {value}; it must lie between 0 and 1, both left out.")


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
