"""The prior precision of a Laplace posterior that validation rows choose, among multiples of the evidence's.

The marginal likelihood's own is too low wherever the Gaussian is no good approximation of what few rows leave open, and
its predictions are then noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from scalabl.core.console import progress_bar
from scalabl.core.modules import eval_mode
from scalabl.metrics.calibration import row_losses
from scalabl.posterior.evidence import HIGHEST
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.scorer import Scorer

TRIED = tuple(10.0**power for power in range(7))  # multiples of the evidence's precision


def tried_precisions(evidence: float) -> list[float]:
    """The precision of the highest evidence and its multiples, rising, within the limits of the search for it; each
    once, as each is a predictive."""
    return list(dict.fromkeys(min(evidence * times, HIGHEST) for times in TRIED))


def index_of_best(
    scorer: Scorer, rows: Sequence[Encoded], predictions: Callable[[Batch], Iterable[Tensor]], *, batch_size: int = 8
) -> int:
    """Which of several predictives has the lowest NLL of labelled rows; the first of equal ones.

    Args:
        scorer: the model with its scoring.
        rows: encoded rows with answers.
        predictions: a batch -> (N, B, C) log class probabilities of each predictive, in their order.
        batch_size: rows at a time.
    """
    likelihood, losses = scorer.scoring.likelihood, dict[int, float]()
    with progress_bar() as progress, eval_mode(scorer.model):
        bar = progress.add_task("prior precision", total=len(rows), detail="")
        for indices, batch in scorer.encoded_batches(rows, batch_size):
            answers = batch.answers.flatten().cpu()
            for i, log_probs in enumerate(predictions(batch)):
                loss = row_losses(likelihood.questions(log_probs).cpu(), answers, 1.0).sum().item()
                losses[i] = losses.get(i, 0.0) + loss
            progress.advance(bar, len(indices))
    return min(losses, key=losses.__getitem__)
