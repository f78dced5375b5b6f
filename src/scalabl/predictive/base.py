"""The interface of a predictive, and the loop over rows that all of them share.

The mean predictive: one pass with s at its posterior mean; for a plain LoRA simply its prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from scalabl.core.modules import eval_mode
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.prefix import SharedPrefix, shared_prefix
from scalabl.scoring.scorer import Scorer, batches


class Predictive(Protocol):
    """A strategy: a scorer and a batch of B rows -> (N, B, C) log class probabilities, -inf for missing choices."""

    name: str
    # and, where a row may stand behind a prefix that was encoded once a particle: shares_prefix = True;
    # where it decides on the rows which other one predicts them: chosen(scorer, rows, batch_size=)

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor: ...


@torch.no_grad()
def predict(
    scorer: Scorer,
    rows: Sequence[Encoded],
    predictive: Predictive,
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
    prefix: SharedPrefix | None = None,
) -> Tensor:
    """Log class probabilities of all rows, (N, n, C) on the CPU, in the rows' order.

    Args:
        scorer: the model with its scoring.
        rows: the encoded rows.
        predictive: the strategy.
        batch_size: rows at a time; the answers do not depend on it.
        advance: called with the number of rows done, for a progress bar.
        prefix: what the rows begin with, kept from call to call; None looks for it in these rows.
    """
    predictive = chosen(predictive, scorer, rows, batch_size)
    classes = max(row.num_choices for row in rows)
    out: Tensor | None = None
    with eval_mode(scorer.model):
        prefix = _prefix(scorer, rows, predictive, prefix)
        if prefix is not None:
            rows = [prefix.cut(row) for row in rows]
        for indices, chunk in batches(rows, batch_size):
            batch = scorer.with_trunk(replace(scorer.scoring.collate(chunk).to(scorer.device), prefix=prefix))
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
    assert out is not None
    return out


def chosen(predictive: Predictive, scorer: Scorer, rows: Sequence[Encoded], batch_size: int) -> Predictive:
    """What predicts these rows: the predictive itself, or what it chooses for them (`auto`)."""
    choose = getattr(predictive, "chosen", None)
    made: Predictive = predictive if choose is None else choose(scorer, rows, batch_size=batch_size)
    return made


def _prefix(
    scorer: Scorer, rows: Sequence[Encoded], predictive: Predictive, kept: SharedPrefix | None
) -> SharedPrefix | None:
    """What the rows are cut behind: the prefix that was kept if all begin with it, else what these rows share."""
    if not getattr(predictive, "shares_prefix", False):
        return None
    usable = kept is not None and scorer.shares_prefix is not False and all(kept.begins(row) for row in rows)
    prefix = kept if usable else shared_prefix(scorer, rows)
    if prefix is not None:
        prefix.claim(predictive, scorer.model)
    return prefix


class MeanPredictive:
    """p(y | x, s_mu), N = 1."""

    name = "mean"
    shares_prefix = True

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        # outside training a stochastic layer is at its mean
        return scorer.class_log_probs(batch)[None]
