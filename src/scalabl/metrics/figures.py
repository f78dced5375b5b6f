"""The figures of one method, of two methods against each other, and of two data sets against each other.

A model at chance can have a fine ECE: it is called collapsed, in words, wherever its figures stand.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics import scores
from scalabl.metrics.bootstrap import Metric, by_rows, check_settings, interval, judged
from scalabl.metrics.detection import detection_draws
from scalabl.metrics.scores import checked


def is_collapsed(accuracy: Metric, labels: Tensor, num_choices: int | Tensor) -> str | None:
    """Why a model counts as collapsed, as a sentence, or None if it beats both guesses.

    The guesses: a random choice (the mean of 1 / num_choices) and always the commonest label. The model beats
    them when the lower end of its accuracy's interval lies above both.

    Args:
        accuracy: as `evaluate` gives it.
        labels: (n,) the rows' labels.
        num_choices: how many choices a row has, or (n,) of them.
    """
    if accuracy.value is None or labels.numel() == 0:
        return None
    chance = torch.as_tensor(num_choices, dtype=torch.float64).reciprocal().mean().item()
    majority = labels.bincount().max().item() / labels.numel()
    low = accuracy.low if accuracy.low is not None else accuracy.value
    if low > max(chance, majority):
        return None
    guess = "random guessing" if chance >= majority else "always giving the commonest answer"
    return (
        f"At chance: its accuracy of {accuracy.value:.1%} (interval from {low:.1%}) is not reliably above "
        f"{guess} ({max(chance, majority):.1%}), so its other figures, however good, say nothing."
    )


_FUNCTIONS: dict[str, Callable[[scores.Rows, Tensor], Tensor]] = {
    "accuracy": scores.accuracy,
    "nll": scores.nll,
    "ece": scores.ece,
    "brier": scores.brier,
    "auroc": scores.auroc,
    "aurc": scores.aurc,
}
_BOUNDS: dict[str, tuple[float, float]] = dict.fromkeys(_FUNCTIONS, (0, 1)) | {"nll": (0, math.inf), "brier": (0, 2)}

METRICS: dict[str, bool] = {name: name in ("accuracy", "auroc") for name in _FUNCTIONS}
"""The metrics by name, and whether higher is better."""


def evaluate(
    probs: Tensor,
    labels: Tensor,
    *,
    num_bins: int = 15,
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    per_row: int = 1,
) -> dict[str, Metric]:
    """Every metric of probs (n, C) and labels (n,), with bootstrap intervals over rows.

    accuracy, nll (nats), ece (share, not percent), brier (sum over choices, 0 to 2), auroc (of being right,
    by confidence), aurc (area under risk against coverage); `metrics/scores.py` defines them, with sources.
    Columns of probability zero (choices a row lacks) change nothing. When all rows are right or all are wrong, auroc
    is None, with the reason, and accuracy's interval is Wilson's, since resamples all say the same. Methods evaluated
    on the same rows with one seed share their resamples. Of `per_row` questions a row
    (`scalabl.metrics.several_labels`) the figures are of questions, the resamples of rows.

    Raises:
        UserError: for probabilities or labels that are none, or settings out of range.
    """
    check_settings(bootstrap, confidence, num_bins)
    rows = scores.Rows.of(*checked(probs, labels), num_bins)
    undefined = {}
    if rows.correct.min() == rows.correct.max():
        side = "right" if rows.correct[0] == 1 else "wrong"
        undefined["auroc"] = f"every answer is {side}, so there is nothing to tell apart"
    figures = {name: by_rows(partial(score, rows), per_row) for name, score in _FUNCTIONS.items()}
    number = len(rows.correct) // per_row
    found = judged(figures, number, bootstrap, seed, confidence, _BOUNDS, undefined)
    if undefined:  # every resample is as right as these rows, however few they are
        share = found["accuracy"].value or 0.0
        low, high = scores.wilson(share, number, confidence)
        found["accuracy"] = Metric(share, min(low, share), max(high, share))
    return found


def paired_difference(
    probs_a: Tensor,
    probs_b: Tensor,
    labels: Tensor,
    metric: str,
    *,
    num_bins: int = 15,
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    per_row: int = 1,
) -> Metric:
    """metric(a) - metric(b) on the same rows, (n, C) and (n,), with the interval of the paired bootstrap.

    An interval with 0 in it says that these rows cannot tell the two apart. None, with the reason, where the
    metric is undefined for one of them.

    Raises:
        UserError: for a metric that does not exist, and as `evaluate`.
    """
    check_settings(bootstrap, confidence, num_bins)
    if metric not in _FUNCTIONS:
        raise UserError(f"there is no metric {metric!r}; choose from {', '.join(_FUNCTIONS)}.")
    a, b = (scores.Rows.of(*checked(probs, labels), num_bins) for probs in (probs_a, probs_b))
    score = _FUNCTIONS[metric]

    def difference(counts: Tensor) -> Tensor:
        return score(a, counts) - score(b, counts)

    defined = not difference(torch.ones(1, len(a.correct), dtype=torch.float64)).isnan()
    undefined = {} if defined else {metric: f"{metric} is undefined for one of the two methods"}
    rows, figures = len(a.correct) // per_row, {metric: by_rows(difference, per_row)}
    return judged(figures, rows, bootstrap, seed, confidence, {}, undefined)[metric]


def ood_auroc(
    score_in: Tensor, score_out: Tensor, *, bootstrap: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Metric:
    """How well an uncertainty (n,) in and (m,) out of distribution tells the two data sets apart.

    P(score_out > score_in) + P(equal) / 2: 1 when every shifted row is less sure than every known one, 0.5
    when the score sees no difference. Rows of both sets are resampled, each within its own set.

    Raises:
        UserError: for an empty set, NaN, or settings out of range.
    """
    check_settings(bootstrap, confidence)
    return interval(*ood_separations(score_in, score_out, bootstrap, seed), confidence, (0, 1))


def ood_separations(score_in: Tensor, score_out: Tensor, bootstrap: int, seed: int) -> tuple[float, Tensor]:
    """The area of `ood_auroc`, and that of each resample (bootstrap,); the same rows are drawn whatever the scores."""
    return detection_draws(score_in, score_out, bootstrap, seed)["auroc"]
