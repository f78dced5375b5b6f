"""The marginal likelihood of Laplace's method, and the prior precision that maximises it (MacKay 1992)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    squared_norm: float, eigenvalues: Sequence[Tensor], *, steps: int = 100, learning_rate: float = 0.1
) -> float:
    """The prior precision of the highest evidence, by Adam on its logarithm from 1 on [Yang et al.: 100 steps, 0.1].

    Args:
        squared_norm: |theta|^2.
        eigenvalues: the h_i of H.
        steps: of Adam.
        learning_rate: of Adam; the precision moves by a factor of exp(steps * learning_rate) at most.
    """
    device = eigenvalues[0].device
    values = [h.double() for h in eigenvalues]
    log_precision = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([log_precision], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -log_evidence(0.0, squared_norm, values, log_precision.exp())
        loss.backward()
        optimizer.step()
    return log_precision.detach().exp().item()
