"""Answers to questions, as arrays: probabilities, their uncertainty, and the labels that were given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scalabl.data.example import Example
from scalabl.inference.settings import PredictionSettings
from scalabl.inference.thresholds import reasons_of, sets_under
from scalabl.metrics.several_labels import label_probs
from scalabl.metrics.uncertainty import decompose


@dataclass(frozen=True)
class Answer:
    """Predictions for n questions with C classes (zeros in `probs` where a question has fewer choices).

    Where rows may have several of C labels, the three parts of the uncertainty are sums over labels, each for itself.

    Attributes:
        probs: (n, C) class probabilities, averaged over the particles; of several labels, that a row has each.
        entropy: (n,) total uncertainty H[mean p], in nats.
        aleatoric: (n,) mean of H[p_i]: what the data leaves open, in nats.
        epistemic: (n,) entropy - aleatoric, the mutual information: what the model never learnt, in nats.
        label: the n most probable labels (or choice texts); None where the classifier abstains. Empty where rows may
            have several.
        particle_log_probs: (N, n, C) log class probabilities of each particle; -inf where adaptive N drew none. A
            linearised predictive has draws of the logits in their place.
        labels: of rows that may have several, those whose probability is above 1/2; None where the classifier
            abstains. None where rows have one label.
        distance: (n,) to the training rows, higher is further out of scope; None for a run that keeps no features.
        sets: of each row the labels that hold the right one at the coverage that was asked for, None where it has every
            label; None where no coverage was.
        guess: the n most probable labels (of several, those above 1/2), those that were not given too.
        reason: why a row has no label: "out of scope", "unsure" or "promise"; None for one that has.
    """

    probs: NDArray[np.float32]
    entropy: NDArray[np.float32]
    aleatoric: NDArray[np.float32]
    epistemic: NDArray[np.float32]
    label: list[str | None]
    particle_log_probs: NDArray[np.float32]
    distance: NDArray[np.float32] | None = None
    sets: list[list[str] | None] | None = None
    reason: list[str | None] = field(default_factory=list)
    labels: list[list[str] | None] | None = None
    guess: list[Any] = field(default_factory=list)


def likeliest(row: Example, probs: Sequence[float]) -> str:
    """The choice of the highest probability, the first of equal ones; probs (C,) of the row's choices, or more."""
    return row.choices[probs.index(max(probs))]


def those_above_half(row: Example, probs: Sequence[float]) -> list[str]:
    """The labels that a row which may have several is given; probs (C,) that it has each."""
    return [label for label, p in zip(row.choices, probs, strict=True) if p > 0.5]


def answer_of(
    rows: Sequence[Example],
    log_probs: Tensor,
    settings: PredictionSettings | None = None,
    of_mean: Mapping[str, Tensor] | None = None,
    per_row: int = 1,
) -> Answer:
    """log_probs (N, n, C) of N particles for n questions -> their average, its uncertainty and the labels.

    Args:
        rows: the n questions.
        log_probs: of their choices; of several labels (N, n per_row, 2).
        settings: with their thresholds, which say where there is no label, and of sets; None: every row has one.
        of_mean: the rows' energy and distance (n,), those that are known.
        per_row: questions of a row.

    Raises:
        UserError: as `scalabl.metrics.uncertainty.average`; a threshold is not known.
    """
    settings, known = settings or PredictionSettings(), of_mean or {}
    probs, uncertainty = label_probs(log_probs, per_row), decompose(log_probs, per_row)
    reasons = reasons_of(settings, log_probs, known, per_row)
    of_rows = list(zip(rows, probs.tolist(), reasons, strict=True))
    several = per_row > 1
    guess: list[Any] = [those_above_half(row, p) if several else likeliest(row, p) for row, p, _ in of_rows]
    given = [None if why else best for best, why in zip(guess, reasons, strict=True)]
    return Answer(
        probs=probs.float().numpy(),
        entropy=uncertainty.total.float().numpy(),
        aleatoric=uncertainty.aleatoric.float().numpy(),
        epistemic=uncertainty.epistemic.float().numpy(),
        label=[] if several else given,
        labels=given if several else None,
        guess=guess,
        particle_log_probs=(log_probs[..., 1].unflatten(1, (-1, per_row)) if several else log_probs).float().numpy(),
        distance=known["distance"].float().numpy() if "distance" in known else None,
        sets=sets_under(settings, probs, rows),
        reason=reasons,
    )
