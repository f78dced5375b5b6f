"""Confidence: scores of an answer as a probability of its being right, fitted on validation answers.

Three forms, one JSON file each (no pickle):

    isotonic   an increasing curve, straight between knots, of one score, flat outside of them: the increasing step
               function nearest to right and wrong (pool adjacent violators) [Zadrozny and Elkan 2002], as
               scikit-learn's IsotonicRegression predicts
    platt      1 / (1 + exp(-(a z + b))), of one score z in units of its spread, a >= 0, with Platt's targets,
               (n_right + 1) / (n_right + 2) for a right answer and 1 / (n_wrong + 2) for a wrong one, which keep it
               finite where the score separates them [Platt 1999]
    logistic   the same of several scores at once, with an L2 penalty

A score is turned so that higher is surer; isotonic and platt then never fall where it rises. A probability is kept
within 1 / (n + 2) and 1 - 1 / (n + 2): n answers are no proof of certainty [Laplace's rule]. Infinite scores are moved
to the ends of the finite ones. Between forms and scores decides what they say of rows left out.

It holds for answers made as those that it was fitted on, and keeps with it how those were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from scalabl.core.errors import UserError
from scalabl.core.files import read_json, write_json

KINDS = ("isotonic", "platt", "logistic")
FEWEST_ROWS = 20
FEWEST_EACH = 5  # as many as there are folds
_PENALTY = {"platt": 1e6, "logistic": 1.0}  # scikit-learn's C: the higher the weaker
_VERSION = 2
_FURTHEST = 1e3  # spreads from the centre


@dataclass(frozen=True)
class AnswerSettings:
    """How greedy answers are made, as far as their scores depend on it.

    Attributes:
        particles: N that a text is averaged over; 0 is the posterior mean, or a plain LoRA.
        stop: texts that end an answer, sorted.
        chat: whether a prompt stands in the chat template.
        adapter_sha256: of the adapter that writes them.
    """

    particles: int
    stop: tuple[str, ...]
    chat: bool
    adapter_sha256: str | None

    def beside(self, other: AnswerSettings) -> str | None:
        """What tells others from these, a clause; None where nothing does."""
        if self.adapter_sha256 != other.adapter_sha256:
            return "it was fitted on answers of another adapter"
        if self.particles != other.particles:
            here, there = (_averaged(each.particles) for each in (other, self))
            return f"it was fitted on answers of {there}, and these are of {here}"
        if self.stop != other.stop:
            here, there = (_at(each.stop) for each in (other, self))
            return f"it was fitted on answers that end {there}, and these end {here}"
        if self.chat != other.chat:
            here, there = ("with", "without") if other.chat else ("without", "with")
            return f"it was fitted on prompts {there} the chat template, and these are {here} it"
        return None


def _averaged(particles: int) -> str:
    return f"{particles} particles" if particles else "the posterior mean"


def _at(stop: tuple[str, ...]) -> str:
    return f"at {' or '.join(ascii(text) for text in stop)}" if stop else "at no text"


@dataclass(frozen=True)
class Confidence:
    """A fitted confidence.

    Attributes:
        kind: of `KINDS`.
        scores: the names of the scores that it reads.
        signs: for each, 1 where higher is surer and -1 where higher is less sure.
        knots: isotonic: the turned scores, rising.
        heights: isotonic: the probability at each knot.
        centres, scales: platt and logistic: (score - centre) / scale is what is weighted.
        weights: platt and logistic: one for each score.
        intercept: platt and logistic.
        lowest, highest: the ends that it is kept within, so that it is never certain.
        rows, right: the validation answers it was fitted on, and how many of them were right.
        made: how these were made; None where it is not known, and it then holds for no answers of a run.
    """

    kind: str
    scores: tuple[str, ...]
    signs: tuple[int, ...]
    lowest: float
    highest: float
    rows: int
    right: int
    knots: tuple[float, ...] = ()
    heights: tuple[float, ...] = ()
    centres: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    intercept: float = 0.0
    made: AnswerSettings | None = None

    def __call__(self, scores: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
        """Probability of being right of n answers, (n,), from the values (n,) of each score; of one, from numbers.

        Raises:
            UserError: a score is missing, values of different numbers, or NaN.
        """
        values = turned(scores, self.scores, self.signs)
        if self.kind == "isotonic":
            found = np.interp(values[0], self.knots, self.heights)
        else:
            z = (values - np.array(self.centres)[:, None]) / np.array(self.scales)[:, None]
            z = np.clip(z, -_FURTHEST, _FURTHEST)  # an infinite score with a weight of zero says nothing
            found = expit(np.array(self.weights) @ z + self.intercept)
        bounded: NDArray[np.float64] = np.clip(found, self.lowest, self.highest)
        return bounded

    def unlike(self, made: AnswerSettings | None, scores: Mapping[str, Any]) -> str | None:
        """Why it says nothing of answers, a clause; None where it is their probability of being right.

        Args:
            made: how they were made; None where tokens were sampled, or taken by settings of their own.
            scores: those that they have.
        """
        if self.made is None:
            return "how the answers were made that it was fitted on is not known"
        if made is None:
            return "it was fitted on greedy answers, and these are sampled or decoded by settings of their own"
        missing = [name for name in self.scores if name not in scores]
        if missing:
            return f"it reads the score {missing[0]}, which these answers do not have"
        return self.made.beside(made)

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"version": _VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Confidence:
        """Read what `save` wrote; the same numbers to the last bit.

        Raises:
            UserError: there is no such file, or it has another content.
        """
        content = read_json(
            path,
            missing=f"There is no fitted confidence {path}; fit one on validation answers first.",
            mend="fit the confidence again",
            expected="a fitted confidence; fit it again",
            key="kind",
        )
        try:
            known = {field.name: _frozen(content[field.name]) for field in fields(cls)}
            known["made"] = None if known["made"] is None else _settings(known["made"])
            made = cls(**known)
            sound = content.get("version") == _VERSION and _is_sound(made)
        except (KeyError, TypeError, OverflowError):  # a whole number may be too large for a float
            sound = False
        if not sound:
            raise UserError(f"{path} does not hold a fitted confidence as this version writes it; fit it again.")
        return made


def turned(scores: Mapping[str, ArrayLike], names: Sequence[str], signs: Sequence[int]) -> NDArray[np.float64]:
    """(scores, n) values of the named scores, each times its sign.

    Raises:
        UserError: a score is missing, values of different numbers, or NaN.
    """
    missing = [name for name in names if name not in scores]
    if missing:
        raise UserError(
            f"The confidence reads the score {missing[0]!r}, which these answers do not have; compute it too."
        )
    rows = [np.atleast_1d(np.asarray(scores[name], dtype=np.float64)) for name in names]
    if any(row.ndim != 1 or len(row) != len(rows[0]) for row in rows):
        raise UserError(f"The scores {', '.join(names)} must have one value for each answer.")
    values = np.stack(rows) * np.array(signs, dtype=np.float64)[:, None]
    for name, row in zip(names, values, strict=True):
        if np.isnan(row).any():
            raise UserError(f"The score {name} of answer {int(np.isnan(row).argmax())} is NaN; check the model.")
    return values


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _settings(known: Mapping[str, Any]) -> AnswerSettings:
    """How answers were made, of a file.

    Raises:
        KeyError, TypeError: it says something else.
    """
    made = AnswerSettings(**{field.name: _frozen(known[field.name]) for field in fields(AnswerSettings)})
    sound = type(made.particles) is int and made.particles >= 0 and isinstance(made.chat, bool)
    texts = isinstance(made.stop, tuple) and all(isinstance(text, str) for text in made.stop)
    if not sound or not texts or not isinstance(made.adapter_sha256, str | None):
        raise TypeError("not the settings of answers")
    return made


def _is_sound(made: Confidence) -> bool:
    numbers = [*made.knots, *made.heights, *made.centres, *made.scales, *made.weights, made.intercept]
    if not isinstance(made.scores, tuple) or not all(isinstance(name, str) for name in made.scores):
        return False
    if not made.scores or len(made.signs) != len(made.scores) or set(made.signs) - {1, -1}:
        return False
    if (
        not all(math.isfinite(x) for x in [*numbers, made.lowest, made.highest])
        or not 0 < made.lowest < made.highest < 1
    ):
        return False
    if made.kind == "isotonic":
        rising = all(a < b for a, b in zip(made.knots, made.knots[1:], strict=False))
        growing = all(a <= b for a, b in zip(made.heights, made.heights[1:], strict=False))
        return len(made.scores) == 1 and len(made.knots) == len(made.heights) > 0 and rising and growing
    lengths = {len(x) for x in (made.scores, made.centres, made.scales, made.weights)}
    return made.kind in KINDS and len(lengths) == 1 and min(made.scales) > 0


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
    correct, values, signs = _checked(scores, right, higher_is_uncertain, kind, names)
    return _fit(values, correct, kind, names, signs)


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

    Folds have right and wrong answers in equal shares, and the same seed gives every form the same folds.

    Raises:
        UserError: as `fit_confidence`; fewer than 2 folds, or more than there are right or wrong answers.
    """
    names = tuple(names if names is not None else scores)
    correct, values, signs = _checked(scores, right, higher_is_uncertain, kind, names)
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
    forms = [(kind, (name,)) for name in scores for kind in ("isotonic", "platt")]
    forms += [("logistic", tuple(names)) for names in together]  # type: ignore[misc]
    if not forms:
        raise UserError("There is no score to make a confidence of; give at least one.")
    tried = [
        left_out(scores, right, higher_is_uncertain, kind=kind, names=names, folds=folds, seed=seed)
        for kind, names in forms
    ]
    tried.sort(key=lambda one: one.nll)
    best = tried[0]
    return fit_confidence(scores, right, higher_is_uncertain, kind=best.kind, names=best.scores), tried


def _checked(
    scores: Mapping[str, ArrayLike], right: ArrayLike, directions: Mapping[str, bool], kind: str, names: tuple[str, ...]
) -> tuple[NDArray[np.bool_], NDArray[np.float64], tuple[int, ...]]:
    """Whether each row is right (n,), the finite scores (scores, n) turned so that higher is surer, and their signs."""
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
    signs = tuple(-1 if directions[name] else 1 for name in names)
    values = turned(scores, names, signs)
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
    for row in values:
        finite = row[np.isfinite(row)]
        row[:] = np.clip(row, finite.min(), finite.max()) if finite.size else 0.0
    return correct, values, signs


def _fit(
    values: NDArray[np.float64], correct: NDArray[np.bool_], kind: str, names: tuple[str, ...], signs: tuple[int, ...]
) -> Confidence:
    """Fit turned values (scores, n)."""
    n, right = len(correct), int(correct.sum())
    shared = (kind, names, signs, 1 / (n + 2), 1 - 1 / (n + 2), n, right)
    if kind == "isotonic":
        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(values[0], correct.astype(np.float64))
        knots, heights = (tuple(array.tolist()) for array in (fitted.X_thresholds_, fitted.y_thresholds_))
        return Confidence(*shared, knots=knots, heights=heights)
    centres, spread = values.mean(axis=1), values.std(axis=1)
    scales = np.where(spread > 0, spread, 1.0)
    z = ((values - centres[:, None]) / scales[:, None]).T
    # a target between 0 and 1 is a row of either kind, weighted
    target = np.where(correct, (right + 1) / (right + 2), 1 / (n - right + 2))
    model = LogisticRegression(C=_PENALTY[kind], max_iter=10_000, tol=1e-8)
    weight = np.concatenate([target, 1 - target])
    model.fit(np.concatenate([z, z]), np.repeat([1, 0], n), sample_weight=weight)
    weights, intercept = model.coef_[0], float(model.intercept_[0])
    if kind == "platt" and weights[0] < 0:  # the wrong way round on these rows: the score says nothing
        weights, intercept = np.zeros(1), float(logit(target.mean()))
    return Confidence(
        *shared,
        centres=tuple(centres.tolist()),
        scales=tuple(scales.tolist()),
        weights=tuple(weights.tolist()),
        intercept=intercept,
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
    rows = np.concatenate([generator.permutation(np.flatnonzero(correct == side)) for side in (True, False)])
    fold[rows] = np.arange(len(rows)) % folds
    return fold
