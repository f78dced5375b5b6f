"""The mean predictive: one pass with s at its posterior mean; for a plain LoRA simply its prediction."""

from __future__ import annotations

from torch import Tensor

from scalabl.scoring import Batch, Scorer


class MeanPredictive:
    """p(y | x, s_mu), N = 1."""

    name = "mean"
    shares_prefix = True

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        # outside training a stochastic layer is at its mean
        return scorer.class_log_probs(batch)[None]
