"""How often each label is: counts of rows, weights of a likelihood, and the priors of another place. Imports no torch.

A likelihood in which a row of label y counts w_y times is that of rows in which label y is w_y times as often: what is
learnt is p_w(y | x), in proportion to w_y p(y | x) [Elkan 2001, theorem 2; Saerens et al. 2002, eq. 4]. Divided by w_y
and normalised it is p(y | x) under the training rows' own frequencies again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from scalabl.core.errors import UserError
from scalabl.core.files import read_json
from scalabl.core.locations import expanded
from scalabl.data.example import Example, few

BALANCED = "balanced"
SUM_TOLERANCE = 1e-6  # of priors around one


def label_counts(rows: Sequence[Example], labels: Sequence[str]) -> dict[str, int]:
    """How many rows each label has, in the labels' order; 0 where it has none."""
    several = Counter(labels[i] for row in rows for i in row.answers or ())
    found = several + Counter(labels[row.answer] for row in rows if row.answer is not None)
    return {label: found[label] for label in labels}


def class_weights(spec: str, counts: dict[str, int]) -> dict[str, float]:
    """Each label's weight in the likelihood, with mean 1 over the rows: the likelihood keeps its size beside the KL.

    Args:
        spec: "balanced", 1 / (C n_y) up to the mean, so that all labels count alike; or a JSON file {label: weight}.
        counts: n_y, the training rows of each of the C labels; a label without one has weight 1 in "balanced".

    Raises:
        UserError: the file cannot be read, names other labels, or has a weight that is no positive number.
    """
    if spec == BALANCED:
        raw = {label: 1 / count if count else math.nan for label, count in counts.items()}
    else:
        raw = _per_label(expanded(spec), list(counts), "class weights", "weight", zero=False)
    total = sum(weight * counts[label] for label, weight in raw.items() if counts[label])
    mean = total / sum(counts.values())
    return {label: 1.0 if math.isnan(weight) else weight / mean for label, weight in raw.items()}


def read_priors(path: Path, labels: Sequence[str]) -> dict[str, float]:
    """How often each label is where predictions are made: a JSON file {label: probability}, in the labels' order.

    Raises:
        UserError: the file cannot be read, names other labels, or its numbers are no probabilities that sum to one.
    """
    priors = _per_label(path, labels, "priors", "probability", zero=True)
    check_priors(priors)
    return priors


def check_priors(priors: Mapping[str, float]) -> None:
    """Refuse what is no distribution over labels.

    Raises:
        UserError: a negative number, or they do not sum to one.
    """
    total = sum(priors.values())
    if not (abs(total - 1) <= SUM_TOLERANCE and min(priors.values()) >= 0):
        raise UserError(f"The priors sum to {total:.6g}; write probabilities that sum to 1, none of them below 0.")


def prior_ratios(priors: dict[str, float], counts: dict[str, int] | None) -> list[float]:
    """New over old prior of each label: p'(y | x) is in proportion to p(y | x) times it [Saerens et al. 2002, eq. 4].

    Args:
        priors: how often each label is where predictions are made.
        counts: how many training rows each has, as the run's record says.

    Raises:
        UserError: the record does not say it, or no row was trained on of a label that there is to be.
    """
    if counts is None:
        raise UserError(
            "The run's record does not say how many training rows each label has, so that no other priors can be put "
            "in their place; train it again."
        )
    if unseen := [label for label, prior in priors.items() if prior > 0 and not counts[label]]:
        raise UserError(f"No row of {few(unseen)} was trained on, so that its prior must be 0.")
    rows = sum(counts.values())
    return [prior * rows / counts[label] if prior else 0.0 for label, prior in priors.items()]


def _per_label(path: Path, labels: Sequence[str], what: str, number: str, *, zero: bool) -> dict[str, float]:
    form = f"a JSON object {{label: {number}}} with every label of the run"
    read = read_json(path, missing=f"There is no file of {what} {path}.", mend=f"write {form}", expected=form)
    if unknown := [label for label in read if label not in labels]:
        raise UserError(
            f"{path} names the label {unknown[0]!r}, which the run does not have; its labels are {few(labels)}."
        )
    if missing := [label for label in labels if label not in read]:
        raise UserError(f"{path} has no {number} for {few(missing)}; write one for every label.")
    for label, value in read.items():
        fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fine or value < 0 or (value == 0 and not zero):
            wanted = "zero or more" if zero else "a positive number"
            raise UserError(f"{path}: the {number} of {label!r} is {value!r}; it must be {wanted}.")
    return {label: float(read[label]) for label in labels}


def balance_warnings(training: dict[str, int], validation: dict[str, int]) -> list[str]:
    """What is thin about the labels of a run, in sentences: of how many rows each is, trained on and held out."""
    one = [label for label, count in training.items() if count == 1]
    none = [label for label, count in training.items() if count == 0]
    unheld = [label for label, count in validation.items() if count == 0]
    found = []
    if none:
        found.append(
            f"No row of {few(none)} was trained on, as the few there are were held out or not taken; add rows, or "
            "give a validation file."
        )
    if one:
        found.append(f"Of {few(one)} a single row was trained on, which says little about such rows; add some.")
    if unheld and any(validation.values()):
        found.append(
            f"No held-out row is of {few(unheld)}, so that what is fitted on held-out rows does not know such rows; "
            "add some to the validation rows."
        )
    return found
