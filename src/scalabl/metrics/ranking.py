"""How well a score tells wrong answers from right ones, and how true a confidence is; all with bootstrap intervals.

Of n answers with an uncertainty u (higher is less sure) and a correctness r in [0, 1], usually 0 or 1:

    auroc   P(a wrong answer has the higher u) + P(equal) / 2; 0.5 when the score sees nothing
    prr     prediction-rejection ratio: of the area between answering at random and answering the best first, the share
            that the score wins; 1 for a perfect order, 0 for none, below 0 for one that is worse than none
    aurc    mean over k of the error rate of the k surest answers
    ece     sum_b n_b / n |mean r - mean confidence| over equal-width bins of the confidence
    brier   mean of (confidence - r)^2
    nll     mean of -(r log confidence + (1 - r) log(1 - confidence)), in nats

Rejecting the least sure answers one by one, prr = (AURC_random - AURC) / (AURC_random - AURC_oracle), with AURC_random
the mean of 1 - r and AURC_oracle that of ranking by r itself. Up to max_rejection = 1 of the answers are rejected, or
0.5 where only the upper half of coverages counts. It is what lm-polygraph's `PredictionRejectionArea` gives, normalised
by its oracle and its expectation under a random order; there ties are broken by position, here every figure is the
expectation over orders of equal values.

Sources: Malinin and Gales 2021 (2002.07650) for prr; Vashurin et al. 2025 (2406.15627) for max_rejection; Geifman et
al. 2019 for AURC; Guo et al. 2017 for ECE, Brier 1950.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics.bootstrap import Metric, check_settings, judged
from scalabl.metrics.scores import Ranking, calibration_error, gap_by_bin, risk_area, risk_by_coverage, separation

RANKING_METRICS: dict[str, bool] = {"auroc": True, "prr": True, "aurc": False}
"""The metrics of an uncertainty, and whether higher is better."""

CONFIDENCE_METRICS: dict[str, bool] = {"ece": False, "brier": False, "nll": False}
"""The metrics of a confidence, and whether higher is better."""

_BOUNDS: dict[str, tuple[float, float]] = {name: (0, 1) for name in (*RANKING_METRICS, *CONFIDENCE_METRICS)}
_BOUNDS |= {"prr": (-math.inf, 1), "nll": (0, math.inf)}
_Figure = Callable[[Tensor], Tensor]


def judge_ranking(
    uncertainty: ArrayLike,
    right: ArrayLike,
    *,
    max_rejection: float = 1.0,
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Metric]:
    """auroc, prr and aurc of an uncertainty.

    Args:
        uncertainty: (n,) higher is less sure; infinities are in order.
        right: (n,) correctness, 0 to 1.
        max_rejection: how much of the answers prr rejects at most, above 0 up to 1.
        bootstrap, seed, confidence: of the intervals; scores of the same answers share their resamples.

    Returns:
        auroc and prr are None, with the reason, where all answers are equally right, and auroc where some are half
        right.

    Raises:
        UserError: no answers, shapes that differ, NaN, a correctness or a setting out of range.
    """
    check_settings(bootstrap, confidence)
    correct = _correctness(right)
    figures, undefined = _ranking_figures(_values(uncertainty, "uncertainty"), correct, max_rejection)
    return judged(figures, len(correct), bootstrap, seed, confidence, _BOUNDS, undefined)


def judge_confidence(
    confidence: ArrayLike,
    right: ArrayLike,
    *,
    num_bins: int = 15,
    bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Metric]:
    """ece, brier and nll of a confidence that is a probability of being right.

    Args:
        confidence: (n,) 0 to 1.
        right: (n,) correctness, 0 to 1.
        num_bins: of ece.
        bootstrap, seed, level: of the intervals.

    Raises:
        UserError: no answers, shapes that differ, NaN, a confidence or a correctness outside 0 to 1.
    """
    check_settings(bootstrap, level, num_bins)
    values, correct = _values(confidence, "confidence"), _correctness(right)
    _same_rows(values, correct)
    if ((values < 0) | (values > 1)).any():
        raise UserError("A confidence lies outside 0 to 1; calibrate the score on validation rows first.")
    tiny = torch.finfo(torch.float64).tiny
    nll = -(correct * values.clamp(min=tiny).log() + (1 - correct) * (1 - values).clamp(min=tiny).log())
    gap, brier = gap_by_bin(values, correct, num_bins), (values - correct).square()
    figures: dict[str, _Figure] = {
        "ece": lambda counts: calibration_error(gap, counts),
        "brier": lambda counts: counts @ brier / counts.sum(dim=1),
        "nll": lambda counts: counts @ nll / counts.sum(dim=1),
    }
    return judged(figures, len(correct), bootstrap, seed, level, _BOUNDS, {})


def rejection_curve(uncertainty: ArrayLike, right: ArrayLike) -> tuple[Tensor, Tensor]:
    """Coverage k / n and the expected error rate of the k surest answers, k = 1..n, (n,) each.

    Raises:
        UserError: as `judge_ranking`.
    """
    values, correct = _values(uncertainty, "uncertainty"), _correctness(right)
    _same_rows(values, correct)
    return risk_by_coverage(-values, 1 - correct)


def _ranking_figures(
    uncertainty: Tensor, right: Tensor, max_rejection: float
) -> tuple[dict[str, _Figure], dict[str, str]]:
    """Each metric as a function of counts (k, n) -> (k,), and why some of them are not defined."""
    _same_rows(uncertainty, right)
    n = len(right)
    rejected = int(max_rejection * n) if 0 < max_rejection <= 1 else 0
    if rejected < 1:
        raise UserError(
            f"max_rejection is {max_rejection}; it is a share of the {n} answers, at least one of them and at most 1."
        )
    errors, fewest = 1 - right, n - rejected + 1
    least, surest, best = Ranking(uncertainty), Ranking(-uncertainty), Ranking(right)

    def prr(counts: Tensor) -> Tensor:
        at_random = counts @ errors / counts.sum(dim=1)
        to_win = at_random - risk_area(best, errors, counts, fewest)
        won = at_random - risk_area(surest, errors, counts, fewest)
        return torch.where(to_win > 1e-12, won / to_win.clamp(min=1e-12), torch.nan)

    figures: dict[str, _Figure] = {
        "auroc": lambda counts: separation(least, counts * errors, counts * right),
        "prr": prr,
        "aurc": lambda counts: risk_area(surest, errors, counts),
    }
    reasons = {}
    if right.min() == right.max():
        side = {1.0: "right", 0.0: "wrong"}.get(right[0].item(), "equally right")
        reasons = dict.fromkeys(("auroc", "prr"), f"every answer is {side}, so there is nothing to tell apart")
    elif not ((right == 0) | (right == 1)).all():
        reasons["auroc"] = "some answers are half right; take a measure that is 0 or 1"
    return figures, reasons


def _values(given: ArrayLike, what: str) -> Tensor:
    values = torch.as_tensor(given).detach().to("cpu").double()
    if values.ndim != 1 or values.numel() == 0:
        raise UserError(f"{what} must have the shape (answers,), not empty, not {tuple(values.shape)}.")
    if values.isnan().any():
        raise UserError(f"The {what} of answer {int(values.isnan().nonzero()[0])} is NaN; check what it comes from.")
    return values


def _correctness(given: ArrayLike) -> Tensor:
    right = _values(given, "correctness")
    if ((right < 0) | (right > 1)).any():
        raise UserError("A correctness lies outside 0 to 1; pass how right each answer is, as `correctness` gives it.")
    return right


def _same_rows(values: Tensor, right: Tensor) -> None:
    if len(values) != len(right):
        raise UserError(f"There are {len(values)} scores and {len(right)} answers; pass one score for each answer.")
