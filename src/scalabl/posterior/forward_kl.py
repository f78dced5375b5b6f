"""KL(p || q), the direction that the reference code takes for its diagonal model: for the ablation alone.

The ELBO holds KL(q || p). This one asks q to cover the prior: it is no bound on anything, and it drives sigma up to
|mu - p_mean| and beyond whatever the data say. Its prior is fixed: `Prior.empirical` belongs to KL(q || p).
"""

import math

import torch
from torch import Tensor

from scalabl.posterior.gaussian import DiagonalGaussian
from scalabl.posterior.prior import Prior


def forward_kl(posterior: DiagonalGaussian, prior: Prior) -> Tensor:
    """sum_j log(sigma_j / p_std) + (p_std^2 + (p_mean - mu_j)^2) / (2 sigma_j^2) - 1/2, a scalar in nats.

    [The reference code's `kl_divergence` with prior and posterior in this order.]
    """
    mean, std = posterior.mean, posterior.std
    moment = prior.std**2 + (mean - prior.mean).square()
    return (std.log() - math.log(prior.std) + moment / (2 * std.square()) - 0.5).sum()


@torch.no_grad()
def forward_kl_gradient(posterior: DiagonalGaussian, prior: Prior) -> dict[str, Tensor]:
    """The gradient of `forward_kl`, by parameter name."""
    mean, variance = posterior.mean, posterior.std.square()
    shift = mean - prior.mean
    moment = prior.std**2 + shift.square()
    return {"log_mean": mean * shift / variance, "log_std": 1 - moment / variance}
