"""How well a score tells rows of another kind from those in scope: AUROC, AUPR and FPR95, with bootstrap intervals.

A score is higher where a row is less like those in scope. Rows out of scope are what is to be found (the positives):

    auroc   P(an out-of-scope row scores higher) + P(equal) / 2; 0.5 when the score sees nothing
    aupr    average precision, sum over thresholds of precision times the step in recall; the share of out-of-scope rows
            when the score sees nothing
    fpr95   share of in-scope rows that are flagged at the highest threshold that finds 95 % of the out-of-scope rows

Rows of both sets are resampled, each within its own set; scores of the same rows share their resamples.

Sources: Hendrycks and Gimpel 2017 (1610.02136) for AUROC and AUPR; Liang et al. 2018 (1706.02690) for FPR95.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics.bootstrap import Metric, check_settings, interval, resamples
from scalabl.metrics.scores import Ranking, area_under

DETECTION_METRICS: dict[str, bool] = {"auroc": True, "aupr": True, "fpr95": False}
"""The metrics of a score of scope, and whether higher is better."""

FOUND = 0.95  # the share of out-of-scope rows that fpr95 is given at


def judge_detection(
    score_in: Tensor, score_out: Tensor, *, bootstrap: int = 1000, seed: int = 0, confidence: float = 0.95
) -> dict[str, Metric]:
    """auroc, aupr and fpr95 of a score of rows in scope (n,) and out of scope (m,), higher is further out.

    Raises:
        UserError: for an empty set, NaN, or settings out of range.
    """
    check_settings(bootstrap, confidence)
    figures = detection_draws(score_in, score_out, bootstrap, seed)
    return {name: interval(value, draws, confidence, (0, 1)) for name, (value, draws) in figures.items()}


def detection_draws(score_in: Tensor, score_out: Tensor, bootstrap: int, seed: int) -> dict[str, tuple[float, Tensor]]:
    """Each figure of `judge_detection`, and that of each resample (bootstrap,).

    The same rows are drawn whatever the scores.
    """
    for name, score in (("score_in", score_in), ("score_out", score_out)):
        if score.ndim != 1 or score.numel() == 0:
            raise UserError(f"{name} must have the shape (rows,), not empty, not {tuple(score.shape)}.")
        if score.isnan().any():
            raise UserError(f"{name} holds NaN; check the predictions it was computed from.")
    known, shifted = (score.detach().to("cpu").double() for score in (score_in, score_out))
    ranking = Ranking(torch.cat([shifted, known]))

    def figures(out_counts: Tensor, in_counts: Tensor) -> dict[str, Tensor]:
        positives = torch.cat([out_counts, torch.zeros_like(in_counts)], dim=1)
        negatives = torch.cat([torch.zeros_like(out_counts), in_counts], dim=1)
        found, flagged = ranking.through(positives), ranking.through(negatives)
        return {
            "auroc": area_under(found, flagged),
            "aupr": _average_precision(found, flagged),
            "fpr95": _false_alarms(found, flagged),
        }

    once = figures(torch.ones(1, len(shifted)).double(), torch.ones(1, len(known)).double())
    drawn = (_hundreds(resamples(len(shifted), bootstrap, seed)), _hundreds(resamples(len(known), bootstrap, seed + 1)))
    parts = [figures(*pair) for pair in zip(*drawn, strict=True)]
    return {name: (once[name].item(), torch.cat([part[name] for part in parts])) for name in DETECTION_METRICS}


def _hundreds(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Resamples a hundred at a time, however they come: their counts are copied a few times over."""
    single = itertools.chain.from_iterable(chunks)
    while some := list(itertools.islice(single, 100)):
        yield torch.stack(some)


def _average_precision(found: Tensor, flagged: Tensor) -> Tensor:
    """found, flagged (k, groups): rows out of and in scope through each group of equal scores, highest first."""
    step = found.diff(dim=1, prepend=torch.zeros_like(found[:, :1]))
    precision = found / (found + flagged).clamp(min=1)
    return (step * precision).sum(dim=1) / found[:, -1]


def _false_alarms(found: Tensor, flagged: Tensor) -> Tensor:
    """The share of in-scope rows through the first group that has 95 % of the out-of-scope rows."""
    enough = found >= FOUND * found[:, -1:] - 1e-9
    first = enough.double().argmax(dim=1, keepdim=True)
    return (flagged.gather(1, first) / flagged[:, -1:]).squeeze(1)
