"""Answers to questions, as arrays: probabilities, their uncertainty, and the labels that were given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scalabl.data.example import Example
from scalabl.inference.settings import PredictionSettings
from scalabl.inference.thresholds import reasons_of, sets_under
from scalabl.metrics.uncertainty import average, decompose


@dataclass(frozen=True)
class Answer:
    """Predictions for n questions with C classes (zeros in `probs` where a question has fewer choices).

    Attributes:
        probs: (n, C) class probabilities, averaged over the particles.
        entropy: (n,) total uncertainty H[mean p], in nats.
        aleatoric: (n,) mean of H[p_i]: what the data leaves open, in nats.
        epistemic: (n,) entropy - aleatoric, the mutual information: what the model never learnt, in nats.
        label: the n most probable labels (or choice texts); None where the classifier abstains.
        particle_log_probs: (N, n, C) log class probabilities of each particle; -inf where adaptive N drew none. A
            linearised predictive has draws of the logits in their place.
        distance: (n,) to the training rows, higher is further out of scope; None for a run that keeps no features.
        sets: of each row the labels that hold the right one at the coverage that was asked for, None where it has every
            label; None where no coverage was.
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


def answer_of(
    rows: Sequence[Example],
    log_probs: Tensor,
    settings: PredictionSettings | None = None,
    of_mean: Mapping[str, Tensor] | None = None,
) -> Answer:
    """log_probs (N, n, C) of N particles for n questions -> their average, its uncertainty and the labels.

    Args:
        rows: the n questions.
        log_probs: of their choices.
        settings: with their thresholds, which say where there is no label, and of sets; None: every row has one.
        of_mean: the rows' energy and distance (n,), those that are known.

    Raises:
        UserError: as `scalabl.metrics.uncertainty.average`; a threshold is not known.
    """
    settings, known = settings or PredictionSettings(), of_mean or {}
    probs, uncertainty = average(log_probs), decompose(log_probs)
    reasons = reasons_of(settings, log_probs, known)
    best = probs.argmax(dim=-1).tolist()
    return Answer(
        probs=probs.float().numpy(),
        entropy=uncertainty.total.float().numpy(),
        aleatoric=uncertainty.aleatoric.float().numpy(),
        epistemic=uncertainty.epistemic.float().numpy(),
        label=[row.choices[i] if why is None else None for row, i, why in zip(rows, best, reasons, strict=True)],
        particle_log_probs=log_probs.float().numpy(),
        distance=known["distance"].float().numpy() if "distance" in known else None,
        sets=sets_under(settings, probs, rows),
        reason=reasons,
    )
