"""Active learning: which unlabelled rows of a pool to label next.

    margin    minus the gap between the two likeliest answers of mean p: the closest calls, of any kind of run
    bald      mutual information of answer and parameters, H[mean p] - mean H[p_i]: what the particles disagree about
    entropy   H[mean p]: uncertain for whatever reason, a question that nobody could settle included
    random    a seeded order, which the others have to beat; where that was asked, the margin alone did (docs/study.md)

Sources: Houlsby et al. 2011 (BALD, 1112.5745, eq. 2); Gal, Islam and Ghahramani 2017 (from networks, 1703.02910);
Scheffer, Decomain and Wrobel 2001 (margin).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scalabl.core.errors import UserError
from scalabl.runs.stock import Asked, read_classifier

if TYPE_CHECKING:
    from torch import Tensor

    from scalabl.data.example import Example


STRATEGIES = ("margin", "bald", "entropy", "random")


def informativeness(log_probs: Tensor, by: str = "margin", per_row: int = 1) -> Tensor:
    """log_probs (N, n, C) of N particles -> (n,) float64, higher is more informative: in nats, of the margin a gap of
    probabilities, at most 0; of `per_row` questions a row, as of several labels, their sum.

    Raises:
        UserError: no such strategy, or BALD of a single particle.
    """
    from scalabl.metrics.uncertainty import average, decompose

    if by not in ("margin", "bald", "entropy"):
        raise UserError(f"by is {by!r}; predictions rank rows by margin, bald or entropy.")
    if by == "margin":
        two = average(log_probs).topk(2, dim=1).values
        gaps: Tensor = (two[:, 1] - two[:, 0]).unflatten(0, (-1, per_row)).sum(dim=1)
        return gaps
    if by == "bald" and log_probs.shape[0] == 1:
        raise UserError("A single prediction has no epistemic part for BALD to rank by; use the margin.")
    uncertainty = decompose(log_probs, per_row)
    return uncertainty.epistemic if by == "bald" else uncertainty.total


def random_order(rows: int, seed: int) -> Tensor:
    """(rows,) uniform numbers in (0, 1) that the seed fixes."""
    from scalabl.posterior.draws import uniform

    return uniform([0], rows, seed=seed, stream="acquisition")[0]


def most_informative(scores: Tensor, k: int) -> list[int]:
    """The k rows of the highest scores (n,), highest first; equal ones in their order.

    Raises:
        UserError: k is below 1 or above n.
    """
    if not 1 <= k <= len(scores):
        raise UserError(f"k is {k}; it must be between 1 and the {len(scores)} rows of the pool.")
    chosen: list[int] = scores.argsort(descending=True, stable=True)[:k].tolist()
    return chosen


def acquire(
    directory: Path,
    rows: Sequence[Example],
    k: int,
    *,
    by: str = "margin",
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 8,
    model: str | None = None,
    asked: Asked | None = None,
) -> list[tuple[int, float]]:
    """The k rows of a pool that a finished run would learn most from.

    Args:
        directory: the run; unread where rows are taken at random.
        rows: the pool; answers in it are ignored.
        k: how many.
        by: "margin", "bald", "entropy" or "random".
        samples: N of the run's own predictive.
        seed: of its particles, or of the random order.
        batch_size: rows at a time.
        model: the base model, if it has moved.
        asked: how the rows of an adapter without a record are scored.

    Returns:
        (place in the pool, score) of each, most informative first.

    Raises:
        UserError: k out of range, rows that the run cannot encode, BALD of a run without particles.
    """
    if by == "random":
        scores = random_order(len(rows), seed)
    else:
        from scalabl.inference.predictor import Predictor
        from scalabl.inference.settings import PredictionSettings

        # not auto, which may take a predictive without particles
        predictive = read_classifier(directory, model=model, asked=asked).predictive or "mc"
        settings = PredictionSettings(predictive, samples, seed, raw=True)  # what the posterior learnt is asked for
        predictor = Predictor.load(directory, settings, model=model, batch_size=batch_size, asked=asked)
        log_probs = predictor.log_probs(rows, dataset="ranking the pool")
        scores = informativeness(log_probs, by, predictor.per_row)
    return [(i, scores[i].item()) for i in most_informative(scores, k)]
