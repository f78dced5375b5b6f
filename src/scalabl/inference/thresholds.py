"""The thresholds that settings ask for, from a run's held-out rows; and why a row has no label under them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.inference.scope import OF_MEAN, default_score, row_scores, scope_score, scope_threshold, sets_of
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics.conformal import set_thresholds
from scalabl.metrics.selective import confidence_score
from scalabl.metrics.uncertainty import average
from scalabl.runs.record import RunRecord

T = TypeVar("T")


def lacks_threshold(settings: PredictionSettings) -> bool:
    """Whether something is promised whose threshold is not known."""
    s = settings
    return (
        (s.promise is not None and s.threshold is None)
        or (s.max_false_alarms is not None and s.oos_above is None)
        or (s.coverage is not None and s.set_thresholds is None)
    )


def with_thresholds(
    settings: PredictionSettings,
    record: RunRecord,
    held_out: Sequence[Example],
    labels: Tensor,
    log_probs: Tensor,
    of_mean: Callable[[], Mapping[str, Tensor]],
    per_row: int = 1,
) -> PredictionSettings:
    """The settings with every threshold that they lack.

    Args:
        settings: what is promised.
        record: of the run.
        held_out: its n held-out rows, all in scope.
        labels: (n,) the right ones.
        log_probs: (N, n, C) as predicted under the settings.
        of_mean: gives the rows' energy and distance, where they are needed.
        per_row: questions of a row; labels are then (n per_row,) and log_probs (N, n per_row, C).

    Raises:
        UserError: too few rows, or a score that the run does not have.
    """
    if settings.promise is not None and settings.threshold is None:
        settings = replace(settings, threshold=settings.promise.threshold(log_probs, labels, per_row))
    if settings.max_false_alarms is not None and settings.oos_above is None:
        score = settings.oos_score or default_score(record)
        of_rows = scope_score(score, log_probs, of_mean() if score in OF_MEAN else {}, per_row)
        above = scope_threshold(of_rows, settings.max_false_alarms)
        settings = replace(settings, oos_score=score, oos_above=above)
    if settings.coverage is not None and settings.set_thresholds is None:
        scores = row_scores(average(log_probs), held_out, settings.set_score)
        classes = record.labels if settings.per_class else None
        found = set_thresholds(scores, labels.numpy(), settings.coverage, classes=classes)
        settings = replace(settings, set_thresholds=found)
    return settings


def reasons_of(
    settings: PredictionSettings, log_probs: Tensor, of_mean: Mapping[str, Tensor], per_row: int = 1
) -> list[str | None]:
    """Why each of n rows has no label: "out of scope", "unsure" or "promise"; None for one that has.

    Args:
        settings: with their thresholds.
        log_probs: (N, n, C) of the rows' choices.
        of_mean: their energy and distance (n,), those that are needed.
        per_row: questions of a row, of which log_probs then has n per_row.

    Raises:
        UserError: a threshold is not known.
    """
    promise = settings.promise
    if promise is None:
        sure = (confidence_score(log_probs, per_row=per_row) >= (settings.abstain or 0.0)).tolist()
        reasons = [None if given else "unsure" for given in sure]
    else:
        kept = promise.answered(resolved(settings.threshold), log_probs, per_row)
        reasons = [None if given else "promise" for given in kept]
    if settings.max_false_alarms is None:
        return reasons
    scores = scope_score(resolved(settings.oos_score), log_probs, of_mean, per_row)
    above = resolved(settings.oos_above)
    return ["out of scope" if score > above else why for score, why in zip(scores, reasons, strict=True)]


def sets_under(settings: PredictionSettings, probs: Tensor, rows: Sequence[Example]) -> list[list[str] | None] | None:
    """The set of each of n rows, None where it has every label; None where no coverage is asked for.

    Args:
        settings: with their thresholds.
        probs: (n, C) as predicted.
        rows: the n rows.

    Raises:
        UserError: a threshold is not known.
    """
    if settings.coverage is None:
        return None
    return sets_of(probs, rows, settings.set_score, resolved(settings.set_thresholds))


def resolved(value: T | None) -> T:
    """A value that `Predictor.resolve` finds.

    Raises:
        UserError: it was not called.
    """
    if value is None:
        raise UserError("A threshold from the run's held-out rows is not known; call resolve(rows) first.")
    return value


def describe(settings: PredictionSettings) -> list[str]:
    """The thresholds of scope and of sets in words, a sentence each, with what they promise."""
    on_average = "on average over held-out and coming rows (not under shift)"
    sentences = []
    if settings.max_false_alarms is not None and settings.oos_above is not None:
        above, rate = settings.oos_above, f"{100 * settings.max_false_alarms:.4g} %"
        where = f"{settings.oos_score} above {above:.4g}"
        if settings.oos_score == "probability":
            where = f"probability below {-above:.4g}"
        sentences.append(f"scope      null where {where}: at most {rate} of rows in scope, {on_average}")
    if settings.coverage is not None and settings.set_thresholds is not None:
        rate, each = f"{100 * settings.coverage:.4g} %", " of each class" if settings.per_class else ""
        sentences.append(f"sets       hold the right label of at least {rate} of rows{each}, {on_average}")
    return sentences
