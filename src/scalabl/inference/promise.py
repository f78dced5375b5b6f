"""A promised error rate of a finished run: what is promised, and the threshold that its held-out rows give."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalabl.core.errors import UserError
from scalabl.core.locations import expanded
from scalabl.metrics.selective import (
    GUARANTEES,
    SCORES,
    Threshold,
    confidence_score,
    conformal_threshold,
    exact_threshold,
    rows_needed,
    rows_needed_on_average,
)
from scalabl.runs.record import RunRecord
from scalabl.runs.stock import is_stock

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from scalabl.data.example import Example


@dataclass(frozen=True)
class Promise:
    """What is promised; `scalabl.metrics.selective` says what each guarantee means.

    Attributes:
        max_error: the rate, between 0 and 1.
        confidence: of the exact guarantee, between 0 and 1.
        score: "probability", "entropy" or "epistemic".
        guarantee: "exact" or "conformal".

    Raises:
        UserError: a value is out of its range.
    """

    max_error: float
    confidence: float = 0.95
    score: str = "probability"
    guarantee: str = "exact"

    def __post_init__(self) -> None:
        for name in ("max_error", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1, both left out.")
        for name, choices in (("score", SCORES), ("guarantee", GUARANTEES)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")

    def require(self, record: RunRecord, predictive: str | None) -> None:
        """Refuse what no prediction can mend, from a run's record alone.

        Raises:
            UserError: too few held-out rows even if all were right, rows that may not be held out, or a score that the
                run does not have.
        """
        from scalabl.runs.registry import SAMPLED

        require_known(record)
        rows = record.rows["validation"]
        exact = self.guarantee == "exact"
        needed = rows_needed(self.max_error, self.confidence) if exact else rows_needed_on_average(self.max_error)
        if rows < needed:
            raise UserError(
                f"At most {100 * self.max_error:.4g} % errors cannot be promised from {rows} held-out rows, even if "
                f"all were answered rightly: it takes {needed}; {more_rows(record, needed)}, or raise --max-error"
                f"{' or lower --confidence' if exact else ''}."
            )
        if self.score == "epistemic" and (predictive == "mean" or record.method not in SAMPLED):
            raise UserError(
                "A single prediction has no epistemic part; use --score probability or entropy, or the particles of a "
                "run with a posterior (--predictive mc)."
            )

    def threshold(self, log_probs: Tensor, labels: Tensor, per_row: int = 1) -> Threshold:
        """The threshold from held-out rows: log_probs (N, n, C) of their particles, labels (n,); of several labels,
        `per_row` questions a row, a row is wrong where one of them is."""
        from scalabl.metrics.several_labels import wrong_rows

        score = confidence_score(log_probs, self.score, per_row)
        wrong = wrong_rows(log_probs, labels, per_row).numpy()
        if self.guarantee == "conformal":
            return conformal_threshold(score, wrong, self.max_error)
        return exact_threshold(score, wrong, self.max_error, confidence=self.confidence)

    def answered(self, threshold: Threshold, log_probs: Tensor, per_row: int = 1) -> NDArray[np.bool_]:
        """(n,) whether a row is answered; log_probs (N, n, C), or (N, n per_row, C) of several labels."""
        answered: NDArray[np.bool_] = confidence_score(log_probs, self.score, per_row) > threshold.above
        return answered

    def describe(self, threshold: Threshold) -> str:
        """The threshold in words: "probability above 0.8123"."""
        if threshold.abstains:
            return "none: no row is answered"
        if threshold.answered == threshold.rows:
            return "none: every row is answered"
        # entropy and mutual information are scored negatively, so that higher is surer
        if self.score == "probability":
            return f"probability above {threshold.above:.4f}"
        return f"{'mutual information' if self.score == 'epistemic' else self.score} below {-threshold.above:.4g} nats"

    def as_dict(self) -> dict[str, Any]:
        """The promise as plain values."""
        return asdict(self)


def more_rows(record: RunRecord, needed: int) -> str:
    """Where held-out rows are put, and how a run gets them: the middle of a sentence."""
    data = str(record.recipe["data"])
    limit = "" if record.recipe["validation_rows"] >= needed else f" with --validation-rows {needed}"
    if expanded(data).is_dir():
        return f"put more into {expanded(data) / 'validation.jsonl'} and train again{limit}"
    if expanded(data).is_file():
        return (
            f"put them as validation.jsonl beside {Path(data).name} as train.jsonl, and train on that directory{limit}"
        )
    return f"train again{limit}"


def next_step(record: RunRecord, threshold: Threshold) -> str:
    """What would have rows answered where a promise cannot be kept: a sentence."""
    more = "More held-out rows like these would not do"
    if threshold.wanted is not None:
        more = f"About {threshold.wanted:,} held-out rows would do: {more_rows(record, threshold.wanted)}"
    if threshold.possible is None:
        return f"{more}; no rate below a half can be promised of these."
    return f"{more}; of these, --max-error {threshold.possible:g} can be promised."


PROMISE = "no error rate can be promised; give a run of scalabl train, or --abstain"


def held_out_rows(record: RunRecord, otherwise: str = PROMISE) -> tuple[Example, ...]:
    """The validation rows of a finished run: never trained on.

    The run read them once, before training, where it chose between scorings by their NLL (scoring "auto").

    Args:
        record: the run's.
        otherwise: what follows where nobody knows them, for the sentence.

    Raises:
        UserError: its data cannot be read now, is no longer what it was, or nobody knows what its LoRA was trained on.
    """
    from scalabl.data.assemble import select_rows
    from scalabl.data.load import load_task

    require_known(record, otherwise)
    data = record.recipe["data"]
    try:
        rows = select_rows(load_task(data), record.row_settings)
    except UserError as error:
        raise UserError(f"The run's held-out rows come from {data}, which cannot be read now: {error}") from error
    if not record.took(rows.train, rows.validation):
        raise UserError(
            f"{data} has changed since the run was trained on it, so that its held-out rows are not known; "
            "restore the file or train again."
        )
    return rows.validation


def require_known(record: RunRecord, otherwise: str = PROMISE) -> None:
    """Refuse a run whose held-out rows are not known.

    Args:
        record: the run's.
        otherwise: what follows, for the sentence.

    Raises:
        UserError: it was made by bayesianize, on other rows than those of its adapter's run, or no run is known.
    """
    if record.bayesianized is not None and not record.bayesianized.get("own_rows"):
        raise UserError(
            "This run was made by scalabl bayesianize, and which rows its LoRA was not trained on is not known, so "
            f"that {otherwise}."
        )
    if is_stock(record):
        raise UserError(
            "This adapter has no record of the rows that it was trained on, so that none are known to be held out and "
            f"{otherwise}."
        )
