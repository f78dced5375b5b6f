"""The interface of a predictive, and the loop over rows that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from scalabl.scoring import Batch, Encoded, Scorer
from scalabl.scoring.scorer import batches


class Predictive(Protocol):
    """A strategy: a scorer and a batch of B rows -> (N, B, C) log class probabilities, -inf for missing choices."""

    name: str

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor: ...


@torch.no_grad()
def predict(
    scorer: Scorer,
    rows: Sequence[Encoded],
    predictive: Predictive,
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Log class probabilities of all rows, (N, n, C) on the CPU, in the rows' order.

    Args:
        scorer: the model with its scoring.
        rows: the encoded rows.
        predictive: the strategy.
        batch_size: rows at a time; the answers do not depend on it.
        advance: called with the number of rows done, for a progress bar.
    """
    was_training = scorer.model.training
    scorer.model.eval()
    classes = max(row.num_choices for row in rows)
    out: Tensor | None = None
    try:
        for indices, chunk in batches(rows, batch_size):
            batch = scorer.with_trunk(scorer.scoring.collate(chunk).to(scorer.device))
            log_probs = predictive(scorer, batch).float().cpu()
            classes = max(classes, log_probs.shape[-1])
            if out is None or out.shape[-1] < classes:
                wider = torch.full((log_probs.shape[0], len(rows), classes), -torch.inf)
                if out is not None:
                    wider[..., : out.shape[-1]] = out
                out = wider
            out[:, indices, : log_probs.shape[-1]] = log_probs
            if advance is not None:
                advance(len(indices))
    finally:
        scorer.model.train(was_training)
    assert out is not None
    return out
