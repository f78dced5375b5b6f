"""The linearised predictive: logits Gaussian in s, from one forward pass and C - 1 backward passes to s alone.

    f(x, s) ~ f(x, s_mu) + J (s - s_mu),   J = df/ds at s_mu    =>    f(x, s) ~ N(f(x, s_mu), J Sigma J^T)

[Immer et al. 2021, 2008.08400, eq. of the GLM predictive; here with respect to the r numbers of each layer only.]
The softmax of that Gaussian is averaged over quasi-Monte Carlo points: its cost does not grow with the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalabl.errors import UserError
from scalabl.scoring import Batch, Scorer
from scalabl.tuner import values

_MOST_CONTRASTS = 25  # a question has at most 26 choices


class LinearizedPredictive:
    """Logit draws of the linearised model: (points, B, C) log class probabilities.

    Args:
        points: quasi-Monte Carlo points of the softmax-Gaussian integral; a power of two is best.
        seed: scrambles the points.

    Raises:
        UserError: points is below 1.
    """

    name = "linearized"

    def __init__(self, points: int = 128, *, seed: int = 0) -> None:
        if points < 1:
            raise UserError(f"points is {points}; it must be at least 1.")
        self.points = points
        self.seed = seed

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        mean, covariance = logit_gaussian(scorer, batch)
        contrasts = covariance.shape[-1]
        if contrasts == 0:
            return mean.log_softmax(dim=-1)[None]
        # always the same points, of which a batch with fewer classes uses the first dimensions
        sobol = torch.quasirandom.SobolEngine(_MOST_CONTRASTS, scramble=True, seed=self.seed)
        uniform = sobol.draw(self.points, dtype=torch.float64)[:, :contrasts].clamp(1e-12, 1 - 1e-12)
        noise = torch.special.ndtri(uniform).to(covariance)
        shift = torch.einsum("pk,bck->pbc", noise, matrix_root(covariance))
        # the first class is the reference: only differences of logits matter
        return torch.cat([mean[None, :, :1].expand(self.points, -1, -1), mean[None, :, 1:] + shift], -1).log_softmax(-1)


def logit_gaussian(scorer: Scorer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean (B, C) of the class logits, and the covariance (B, C - 1, C - 1) of their differences to the first.

    The mean is -inf where a row has no such choice; the covariance is zero there.
    """
    with torch.enable_grad(), values(scorer.model, len(batch)) as layers:
        logits = scorer.class_logits(batch)
        inputs = [s for s, _ in layers.values()]
        rows, classes = logits.shape
        present = torch.arange(classes, device=logits.device) < batch.num_choices[:, None]
        jacobians: list[list[Tensor]] = [[] for _ in inputs]
        for c in range(1, classes):
            weights = torch.zeros_like(logits)
            weights[:, c] = present[:, c].to(logits.dtype)
            weights[:, 0] = -weights[:, c]
            gradients = torch.autograd.grad(logits, inputs, weights, retain_graph=c < classes - 1)
            for store, gradient in zip(jacobians, gradients, strict=True):
                store.append(gradient.detach().float())
    covariance = torch.zeros(rows, classes - 1, classes - 1, device=logits.device)
    with torch.no_grad():
        if classes > 1:
            for store, (_, posterior) in zip(jacobians, layers.values(), strict=True):
                jacobian = torch.stack(store, dim=1)  # (B, C - 1, r)
                covariance += jacobian @ posterior.covariance().float() @ jacobian.transpose(1, 2)
    return logits.detach(), covariance


def matrix_root(covariance: Tensor) -> Tensor:
    """(..., C, C) positive semi-definite -> its symmetric root R, R R = R R^T; unique, and defined where singular."""
    eigenvalues, vectors = torch.linalg.eigh(covariance.double())
    root = (vectors * eigenvalues.clamp_min(0).sqrt()[..., None, :]) @ vectors.transpose(-1, -2)
    return root.to(covariance.dtype)
