"""Fit a confidence on validation answers, and choose between forms and scores by what they say of rows left out.

    isotonic   the increasing step function nearest to right and wrong (pool adjacent violators) [Zadrozny and Elkan
               2002], with straight lines between steps, as scikit-learn's IsotonicRegression predicts
    platt      a logistic curve with Platt's targets, (n_right + 1) / (n_right + 2) for a right answer and
               1 / (n_wrong + 2) for a wrong one, which keep it finite where the score separates them [Platt 1999]
    logistic   a logistic regression on several scores in units of their spread, the same targets, and an L2 penalty

A probability is held within 1 / (n + 2) and 1 - 1 / (n + 2): n answers are no proof of certainty [Laplace's rule].
Infinite scores are moved to the ends of the finite ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scalabl.core.errors import UserError
from scalabl.generation.confidence import KINDS, Confidence, turned

FEWEST_ROWS = 20
FEWEST_EACH = 5  # as many as there are folds
_PENALTY = {"platt": 1e6, "logistic": 1.0}  # scikit-learn's C: the higher the weaker


@dataclass(frozen=True)
class LeftOut:
    """What a form of confidence says of rows that it was not fitted on.

    Attributes:
        kind, scores: the form.
        nll: mean of -log p(what the row was), nats.
        brier: mean of (p - right)^2.
        confidence: (n,) of every row, by the fit without it.
    """

    kind: str
    scores: tuple[str, ...]
    nll: float
    brier: float
    confidence: NDArray[np.float64]


def fit_confidence(
    scores: Mapping[str, ArrayLike],
    right: ArrayLike,
    higher_is_uncertain: Mapping[str, bool],
    *,
    kind: str = "isotonic",
    names: Sequence[str] | None = None,
) -> Confidence:
    """A confidence from scores of validation answers.

    Args:
        scores: name -> (n,) values.
        right: (n,) whether each answer is right.
        higher_is_uncertain: name -> which way it points.
        kind: "isotonic", "platt" or "logistic".
        names: the scores to read; all of them. isotonic and platt read one.

    Raises:
        UserError: fewer than 20 rows or 5 of a kind, NaN, another number of scores than the form reads, no such form.
    """
    names = tuple(names if names is not None else scores)
    correct, values = _checked(scores, right, higher_is_uncertain, kind, names)
    return _fit(values, correct, kind, names, tuple(-1 if higher_is_uncertain[name] else 1 for name in names))


def left_out(
    scores: Mapping[str, ArrayLike],
    right: ArrayLike,
    higher_is_uncertain: Mapping[str, bool],
    *,
    kind: str = "isotonic",
    names: Sequence[str] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> LeftOut:
    """K-fold cross-validation of `fit_confidence`: every row is judged by a fit on the other folds.

    Folds hold right and wrong answers in equal shares, and the same seed gives every form the same folds.

    Raises:
        UserError: as `fit_confidence`; fewer than 2 folds, or more than there are right or wrong answers.
    """
    names = tuple(names if names is not None else scores)
    correct, values = _checked(scores, right, higher_is_uncertain, kind, names)
    signs = tuple(-1 if higher_is_uncertain[name] else 1 for name in names)
    fold = _folds(correct, folds, seed)
    found = np.empty(len(correct))
    for k in range(folds):
        inside = fold != k
        made = _fit(values[:, inside], correct[inside], kind, names, signs)
        found[~inside] = made({name: s * v[~inside] for name, s, v in zip(names, signs, values, strict=True)})
    nll = -np.where(correct, np.log(found), np.log1p(-found)).mean()
    return LeftOut(kind, names, float(nll), float(np.square(found - correct).mean()), found)


def choose_confidence(
    scores: Mapping[str, ArrayLike],
    right: ArrayLike,
    higher_is_uncertain: Mapping[str, bool],
    *,
    together: Sequence[Sequence[str]] = (),
    folds: int = 5,
    seed: int = 0,
) -> tuple[Confidence, list[LeftOut]]:
    """The form with the lowest left-out NLL, fitted on all rows, and what all of them had, best first.

    Args:
        scores: name -> (n,) values; isotonic and platt are tried on each.
        right: (n,) whether each answer is right.
        higher_is_uncertain: name -> which way it points.
        together: sets of names; logistic is tried on each.
        folds, seed: of the cross-validation.

    The best of many left-out figures flatters itself; judge the choice on test rows.

    Raises:
        UserError: as `left_out`.
    """
    tried: list[tuple[str, tuple[str, ...]]] = [(kind, (name,)) for name in scores for kind in ("isotonic", "platt")]
    tried += [("logistic", tuple(names)) for names in together]
    if not tried:
        raise UserError("There is no score to make a confidence of; give at least one.")
    found = [
        left_out(scores, right, higher_is_uncertain, kind=kind, names=names, folds=folds, seed=seed)
        for kind, names in tried
    ]
    found.sort(key=lambda one: one.nll)
    best = found[0]
    return fit_confidence(scores, right, higher_is_uncertain, kind=best.kind, names=best.scores), found


def _checked(
    scores: Mapping[str, ArrayLike], right: ArrayLike, directions: Mapping[str, bool], kind: str, names: tuple[str, ...]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Whether each row is right (n,), and the scores (scores, n) turned so that higher is surer."""
    if kind not in KINDS:
        raise UserError(f"There is no form of confidence {kind!r}; choose one of {', '.join(KINDS)}.")
    if not names or (kind != "logistic" and len(names) != 1):
        raise UserError(
            f"A confidence of the form {kind} reads one score, not {len(names)}; take logistic for several."
        )
    unknown = [name for name in names if name not in directions]
    if unknown:
        raise UserError(f"It is not known whether a high {unknown[0]} means sure or unsure; give higher_is_uncertain.")
    given = np.asarray(right, dtype=np.float64)
    if given.ndim != 1 or not np.isin(given, (0.0, 1.0)).all():
        raise UserError("Each validation answer must be right (1) or wrong (0); choose a measure that says so.")
    values = turned(scores, names, [-1 if directions[name] else 1 for name in names])
    correct: NDArray[np.bool_] = given == 1
    if values.shape[1] != len(correct):
        raise UserError(
            f"There are {values.shape[1]} scores and {len(correct)} answers; pass one score for each answer."
        )
    if len(correct) < FEWEST_ROWS:
        raise UserError(f"A confidence takes {FEWEST_ROWS} validation answers at least, and there are {len(correct)}.")
    for side, count in (("right", int(correct.sum())), ("wrong", int((~correct).sum()))):
        if count < FEWEST_EACH:
            raise UserError(
                f"Only {count} of {len(correct)} validation answers are {side}, and a confidence takes {FEWEST_EACH} "
                "of either kind; give more rows, or a measure that tells more of them apart."
            )
    return correct, np.stack([_finite(row) for row in values])


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    finite = values[np.isfinite(values)]
    return np.clip(values, finite.min(), finite.max()) if finite.size else np.zeros_like(values)


def _fit(
    values: NDArray[np.float64],
    correct: NDArray[np.bool_],
    kind: str,
    names: tuple[str, ...],
    signs: tuple[int, ...],
) -> Confidence:
    """Fit turned values (scores, n)."""
    n = len(correct)
    shared = (kind, names, signs, 1 / (n + 2), 1 - 1 / (n + 2), n, int(correct.sum()))
    if kind == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(values[0], correct.astype(np.float64))
        return Confidence(*shared, knots=_plain(fitted.X_thresholds_), heights=_plain(fitted.y_thresholds_))
    from sklearn.linear_model import LogisticRegression

    centres, spread = values.mean(axis=1), values.std(axis=1)
    scales = np.where(spread > 0, spread, 1.0)
    z = ((values - centres[:, None]) / scales[:, None]).T
    # a target between 0 and 1 is a row of either kind, weighted
    high, low = (correct.sum() + 1) / (correct.sum() + 2), 1 / (n - correct.sum() + 2)
    target = np.where(correct, high, low)
    model = LogisticRegression(C=_PENALTY[kind], max_iter=10_000, tol=1e-8)
    kinds = np.repeat([1, 0], n)
    model.fit(np.concatenate([z, z]), kinds, sample_weight=np.concatenate([target, 1 - target]))
    weights, intercept = model.coef_[0], float(model.intercept_[0])
    if kind == "platt" and weights[0] < 0:  # the wrong way round on these rows: the score says nothing
        share = target.mean()
        weights, intercept = np.zeros(1), float(np.log(share / (1 - share)))
    return Confidence(
        *shared, centres=_plain(centres), scales=_plain(scales), weights=_plain(weights), intercept=intercept
    )


def _folds(correct: NDArray[np.bool_], folds: int, seed: int) -> NDArray[np.int64]:
    """The fold (n,) of each row, right and wrong ones dealt out in turn."""
    fewest = min(int(correct.sum()), int((~correct).sum()))
    if not 2 <= folds <= fewest:
        raise UserError(
            f"folds is {folds}; it must be at least 2 and at most {fewest}, the fewer of right and wrong answers."
        )
    generator = np.random.Generator(np.random.Philox(seed))
    fold = np.empty(len(correct), dtype=np.int64)
    start = 0
    for side in (True, False):
        rows = generator.permutation(np.flatnonzero(correct == side))
        fold[rows] = (start + np.arange(len(rows))) % folds
        start += len(rows)
    return fold


def _plain(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
