"""Which rows are out of a run's scope, and which labels are in a row's set: scores, what a run must have for a promise,
and the thresholds that its held-out rows give.

A row in scope is one like those the run was trained on. The score of a row is higher the further out it is; of n
held-out rows, all in scope, the ceil((n + 1)(1 - a))-th smallest score is passed by a further row in scope with
probability a at most, on average over the held-out rows (`scalabl.metrics.conformal`). How many rows out of scope
are found by it is not promised: `scalabl evaluate --ood` measures it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scalabl.core.errors import UserError
from scalabl.inference.promise import more_rows, require_known
from scalabl.metrics.conformal import (
    conformal_quantile,
    label_scores,
    label_sets,
    require_of_each,
    rows_for_coverage,
)
from scalabl.metrics.selective import confidence_score
from scalabl.runs.record import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from scalabl.data.example import Example

OF_PREDICTIONS = ("probability", "entropy", "epistemic")
OF_MEAN = ("energy", "distance")
SCOPE_SCORES = (*OF_PREDICTIONS, *OF_MEAN)


def default_score(record: RunRecord) -> str:
    """By which rows are told to be out of scope: the distance where the run keeps its features, else the entropy."""
    return "entropy" if record.features_sha256 is None else "distance"


def scope_scores(log_probs: Tensor, of_mean: Mapping[str, Tensor], per_row: int = 1) -> dict[str, NDArray[np.float64]]:
    """Every score that there is of n rows, (n,) each, higher is further out.

    probability: minus the highest probability; entropy and epistemic (of several particles), in nats.

    Args:
        log_probs: (N, n, C) of N particles.
        of_mean: energy and distance (n,), those that are known.
        per_row: questions of a row, of which log_probs then has n per_row.
    """
    known = OF_PREDICTIONS if log_probs.shape[0] > 1 else OF_PREDICTIONS[:2]
    found = {name: -confidence_score(log_probs, name, per_row) for name in known}
    return found | {name: np.asarray(values, dtype=np.float64) for name, values in of_mean.items()}


def scope_score(name: str, log_probs: Tensor, of_mean: Mapping[str, Tensor], per_row: int = 1) -> NDArray[np.float64]:
    """One of `scope_scores`, by its name.

    Raises:
        UserError: epistemic of a single prediction.
    """
    known = scope_scores(log_probs, of_mean, per_row)
    if name not in known:
        raise UserError(
            f"A single prediction has no {name} part; use --oos-score {', '.join(known)}, or several particles."
        )
    return known[name]


def scope_threshold(scores: NDArray[np.float64], max_false_alarms: float) -> float:
    """The score above which a row is out of scope, from those of held-out rows.

    Raises:
        UserError: too few of them.
    """
    return conformal_quantile(scores, 1 - max_false_alarms)


def require_scope(record: RunRecord, max_false_alarms: float, score: str | None, predictive: str | None) -> None:
    """Refuse what no prediction can mend, from a run's record alone.

    Raises:
        UserError: too few held-out rows, or a score that the run does not have.
    """
    from scalabl.runs.registry import SAMPLED

    require_known(record)
    needed, rows = rows_for_coverage(1 - max_false_alarms), record.rows["validation"]
    if rows < needed:
        raise UserError(
            f"False alarms of at most {100 * max_false_alarms:.4g} % take at least {needed} held-out rows, and the run "
            f"has {rows}; {more_rows(record, needed)}, or raise --max-false-alarms."
        )
    if score == "epistemic" and (predictive == "mean" or record.method not in SAMPLED):
        raise UserError("A single prediction has no epistemic part; take another --oos-score.")
    if score == "distance" and record.features_sha256 is None:
        raise UserError(
            "This run keeps no features of its training rows, so that no distance to them is known; train it again "
            "with a classification head, or take another --oos-score."
        )


def require_coverage(record: RunRecord, coverage: float, held_out: Sequence[Example] | None = None) -> None:
    """Refuse sets that no prediction can mend.

    Args:
        record: of the run.
        coverage: the promised rate.
        held_out: the run's validation rows, to count each class's, where it is promised within each; else None.

    Raises:
        UserError: too few held-out rows, of all or of a class, or rows whose classes are their own.
    """
    require_known(record)
    needed, rows = rows_for_coverage(coverage), record.rows["validation"]
    if rows < needed:
        raise UserError(
            f"A coverage of {100 * coverage:.4g} % takes at least {needed} held-out rows, and the run has {rows}; "
            f"{more_rows(record, needed)}, or lower --coverage."
        )
    if held_out is None:
        return
    if record.labels is None:
        raise UserError("The rows of this run have choices of their own and no common classes; leave out --per-class.")
    counts = np.bincount([row.answer or 0 for row in held_out], minlength=len(record.labels))
    require_of_each(counts.tolist(), record.labels, coverage)


def number_of(row: Example) -> float:
    """u in [0, 1) of a row, from its content alone: the same in every call, and of every other row another one."""
    content = json.dumps(row.content).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "big") / 2**56


def row_scores(probs: Tensor, rows: Sequence[Example], kind: str) -> NDArray[np.float64]:
    """(n, C) how little each label suits its row; probs (n, C) as predicted."""
    u = None if kind == "lac" else [number_of(row) for row in rows]
    return label_scores(probs.numpy(), kind, u)


def sets_of(probs: Tensor, rows: Sequence[Example], kind: str, thresholds: Sequence[float]) -> list[list[str] | None]:
    """The set of each of n rows, its likeliest label first; None where it has every label, and says nothing.

    Args:
        probs: (n, C) as predicted.
        rows: the n rows.
        kind: of the score.
        thresholds: of `set_thresholds`.
    """
    inside = label_sets(probs.numpy(), row_scores(probs, rows, kind), thresholds)
    made: list[list[str] | None] = []
    for row, of_row, p in zip(rows, inside, probs.tolist(), strict=True):
        number = len(row.choices)
        chosen = sorted((c for c in range(number) if of_row[c]), key=lambda c: -p[c])
        made.append(None if len(chosen) == number else [row.choices[c] for c in chosen])
    return made
