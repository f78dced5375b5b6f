"""What a classifier takes and gives, wherever its model runs: questions as rows, log-probabilities as an `Answer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scalabl.errors import UserError
from scalabl.tasks import Example
from scalabl.tasks.example import check
from scalabl.tasks.images import images_of
from scalabl.uncertainty import average, decompose


@dataclass(frozen=True)
class Answer:
    """Predictions for n questions with C classes (zeros in `probs` where a question has fewer choices).

    Attributes:
        probs: (n, C) class probabilities, averaged over the particles.
        entropy: (n,) total uncertainty H[mean p], in nats.
        aleatoric: (n,) mean of H[p_i]: what the data leaves open, in nats.
        epistemic: (n,) entropy - aleatoric, the mutual information: what the model never learnt, in nats.
        label: the n most probable labels (or choice texts).
        particle_log_probs: (N, n, C) log class probabilities of each particle; -inf where adaptive N drew none. A
            linearised predictive has draws of the logits in their place.
    """

    probs: NDArray[np.float32]
    entropy: NDArray[np.float32]
    aleatoric: NDArray[np.float32]
    epistemic: NDArray[np.float32]
    label: list[str]
    particle_log_probs: NDArray[np.float32]


def answer_of(rows: Sequence[Example], log_probs: Tensor) -> Answer:
    """log_probs (N, n, C) of N particles for n questions -> their average, its uncertainty and the labels.

    Raises:
        UserError: as `scalabl.uncertainty.average`.
    """
    probs, uncertainty = average(log_probs), decompose(log_probs)
    best = probs.argmax(dim=-1).tolist()
    return Answer(
        probs=probs.float().numpy(),
        entropy=uncertainty.total.float().numpy(),
        aleatoric=uncertainty.aleatoric.float().numpy(),
        epistemic=uncertainty.epistemic.float().numpy(),
        label=[row.choices[i] for row, i in zip(rows, best, strict=True)],
        particle_log_probs=log_probs.float().numpy(),
    )


def rows_of(
    questions: str | Sequence[str | Mapping[str, Any] | Example], labels: tuple[str, ...] | None
) -> list[Example]:
    """Questions as rows.

    Args:
        questions: prompts (with label words), or rows {"question", "choices"}, with an "image" or not, or `Example`s.
        labels: the label words of a classifier that has them.

    Raises:
        UserError: no questions, a prompt where the scoring needs choices, or choices other than the labels.
    """
    given = [questions] if isinstance(questions, str) else questions
    rows = [_row(index, question, labels) for index, question in enumerate(given)]
    if not rows:
        raise UserError("There are no questions to answer; pass at least one.")
    return rows


def _row(index: int, question: str | Mapping[str, Any] | Example, labels: tuple[str, ...] | None) -> Example:
    if isinstance(question, Example):
        return _checked(question, labels)
    if isinstance(question, str):
        if labels is None:
            raise UserError('This classifier scores choices; pass rows {"question": ..., "choices": [...]}.')
        return Example(str(index), question, labels, None)
    choices = question.get("choices", labels)
    text = question.get("question", question.get("text"))
    if text is None or choices is None:
        raise UserError(f'Question {index} lacks "question" or "choices"; give both.')
    images = images_of(question, Path(), f"question {index}")
    return _checked(Example(str(index), text, tuple(choices), None, images), labels)


def _checked(row: Example, labels: tuple[str, ...] | None) -> Example:
    if labels is not None and row.choices != labels:
        raise UserError(f"Question {row.id} has choices of its own, but this classifier answers {labels}.")
    return check(row, f"question {row.id}")
