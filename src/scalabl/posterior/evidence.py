"""The marginal likelihood of Laplace's method, and the prior precision that maximises it (MacKay 1992)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import brentq
from torch import Tensor

LOWEST, HIGHEST = 1e-8, 1e4  # of a prior precision


def log_evidence(
    log_likelihood: float | Tensor, squared_norm: float | Tensor, eigenvalues: Sequence[Tensor], precision: Tensor
) -> Tensor:
    """log p(D | precision) ~ log p(D | theta) - precision |theta|^2 / 2 - 1/2 sum_i log(1 + h_i / precision), in nats.

    It is Laplace's approximation at theta under the prior N(0, I / precision): the log-likelihood, plus the log prior,
    plus half the log determinant of 2 pi (H + precision I)^-1. Eigenvalues that are zero add nothing.

    Args:
        log_likelihood: log p(D | theta).
        squared_norm: |theta|^2.
        eigenvalues: the h_i of H, in tensors of any shape.
        precision: of the prior, positive, a scalar.
    """
    determinant = torch.stack([torch.log1p(h / precision).sum() for h in eigenvalues]).sum()
    return log_likelihood - precision * squared_norm / 2 - determinant / 2


def best_precision(
    squared_norm: float, eigenvalues: Sequence[Tensor], *, low: float = LOWEST, high: float = HIGHEST
) -> float:
    """The prior precision of the highest evidence, within limits: MacKay's equation, solved by Brent's method.

        precision |theta|^2 = sum_i h_i / (h_i + precision)

    The right side, the number of effective parameters, falls in the precision while the left one rises, so that the
    evidence has one maximum.

    Args:
        squared_norm: |theta|^2.
        eigenvalues: the h_i of H, at least 0.
        low: the lowest precision.
        high: the highest.
    """
    values = torch.cat([h.double().flatten() for h in eigenvalues])
    values = values[values > 0]

    def excess(log_precision: float) -> float:
        precision = math.exp(log_precision)
        return precision * squared_norm - (values / (values + precision)).sum().item()

    if excess(math.log(low)) >= 0:
        return low
    return high if excess(math.log(high)) <= 0 else math.exp(brentq(excess, math.log(low), math.log(high)))
