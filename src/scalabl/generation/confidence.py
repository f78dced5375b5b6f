"""Confidence: scores of an answer as a probability of its being right, fitted on validation answers (`calibration.py`).

Three forms, one JSON file each (no pickle):

    isotonic   an increasing curve, straight between knots, of one score; flat outside of them
    platt      1 / (1 + exp(-(a z + b))), of one score z in units of its spread, a >= 0
    logistic   the same of several scores at once

A single score is turned so that higher is surer; isotonic and platt then never fall where it rises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scalabl.core.errors import UserError
from scalabl.core.files import read_json, write_json

KINDS = ("isotonic", "platt", "logistic")
_VERSION = 1
_FURTHEST = 1e3  # spreads from the centre


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
        lowest, highest: the ends that it is held within, so that it is never certain.
        rows, right: the validation answers it was fitted on, and how many of them were right.
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
            found = _sigmoid(np.array(self.weights) @ z + self.intercept)
        held: NDArray[np.float64] = np.clip(found, self.lowest, self.highest)
        return held

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"version": _VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Confidence:
        """Read what `save` wrote; the same numbers to the last bit.

        Raises:
            UserError: there is no such file, or it holds something else.
        """
        content = read_json(
            path,
            missing=f"There is no fitted confidence {path}; fit one on validation answers first.",
            mend="fit the confidence again",
            holds="a fitted confidence; fit it again",
            key="kind",
        )
        try:
            made = cls(**{field.name: _frozen(content[field.name]) for field in fields(cls)})
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


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.special import expit

    found: NDArray[np.float64] = expit(x)
    return found


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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
