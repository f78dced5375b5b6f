"""Laplace's linearised predictive: class logits are Gaussian, N(f(x), J (H + precision I)^-1 J^T).

One forward pass and C backward passes a row give the logits' mean and covariance; the softmax's average is taken over
fixed draws of the logits, or by the probit approximation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from scalabl.errors import UserError
from scalabl.posterior import standard_normal
from scalabl.predictive.kronecker import Block, jacobians, recorded
from scalabl.scoring import Batch, Scorer

# the most choices that a row can have: a particle's noise does not depend on what stands beside the row
_CLASSES = 26
_JITTER = 1e-6


class LinearizedLaplacePredictive:
    """The predictive of Laplace-LoRA.

    Args:
        blocks: the curvature of every A and B by name.
        precision: of the prior.
        samples: N draws of the logits (they cost no pass); not read by "probit".
        seed: of the draws.
        link: "sample" averages softmax over draws of the joint Gaussian, "probit" scales each logit by
            1 / sqrt(1 + pi/8 var) and gives one particle (MacKay 1992).

    Raises:
        UserError: samples is below 1, or there is no such link.
    """

    name = "laplace"

    def __init__(
        self,
        blocks: Mapping[str, Block],
        precision: float,
        *,
        samples: int = 1000,
        seed: int = 0,
        link: Literal["sample", "probit"] = "sample",
    ) -> None:
        if samples < 1:
            raise UserError(f"samples is {samples}; it must be at least 1.")
        if link not in ("sample", "probit"):
            raise UserError(f"link is {link!r}; it must be sample or probit.")
        self.blocks = blocks
        self.precision = precision
        self.samples = samples
        self.link = link
        self._noise = standard_normal(range(samples), _CLASSES, seed=seed, stream="laplace.logits")

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        mean, covariance = self.logit_distribution(scorer, batch)
        if self.link == "probit":
            variance = covariance.diagonal(dim1=1, dim2=2)
            return (mean / (1 + math.pi / 8 * variance).sqrt()).log_softmax(dim=-1)[None]
        classes = mean.shape[1]
        size = covariance.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-12)
        jitter = _JITTER * size[:, None, None] * torch.eye(classes, device=mean.device)
        root = torch.linalg.cholesky(covariance.double() + jitter.double()).float()
        noise = self._noise[:, :classes].to(mean.device)
        return (mean + torch.einsum("bcd,nd->nbc", root, noise)).log_softmax(dim=-1)

    def logit_distribution(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Tensor]:
        """Class logits (B, C), -inf for missing choices, and their covariance (B, C, C), 0 there."""
        with torch.enable_grad(), recorded(scorer.model) as passed:
            class_logits = scorer.class_logits(batch)
            of_weights = jacobians(class_logits, passed)
        parts = [self.blocks[name].logit_covariance(j, self.precision) for name, j in of_weights.items()]
        return class_logits.detach().float(), torch.stack(parts).sum(dim=0)
