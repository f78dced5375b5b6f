"""Any predictive with a temperature on its particles' class logits."""

from __future__ import annotations

import torch
from torch import Tensor

from scalabl.predictive.base import Predictive
from scalabl.scoring import Batch, Scorer


class TemperedPredictive:
    """log softmax(log p_n / T) of every particle n of another predictive.

    Args:
        inner: the predictive.
        temperature: T, positive.
    """

    def __init__(self, inner: Predictive, temperature: float) -> None:
        self.inner = inner
        self.temperature = temperature
        self.name = inner.name
        self.shares_prefix = getattr(inner, "shares_prefix", False)

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        log_probs = self.inner(scorer, batch)
        scaled = (log_probs / self.temperature).log_softmax(dim=-1)
        # a particle that a row has not drawn stays so
        return scaled.masked_fill(log_probs == -torch.inf, -torch.inf)
