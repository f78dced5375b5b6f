"""q(s) = N(s_mu, diag(s_sigma^2)): the paper's posterior, 2 r numbers a layer."""

import math

import torch
from torch import Tensor

from scalabl.posterior.gaussian import Gaussian
from scalabl.posterior.prior import Prior


class DiagonalGaussian(Gaussian):
    """Independent Gaussians [ScalaBL, eq. of q(s)]."""

    @property
    def std(self) -> Tensor:
        """(r,) standard deviations s_sigma = exp(log s_sigma)."""
        return self.log_std.float().exp()

    def covariance(self) -> Tensor:
        return torch.diag(self.std.square())

    def marginal_std(self) -> Tensor:
        return self.std

    def perturb(self, noise: Tensor) -> Tensor:
        return self.std * noise

    def kl(self, prior: Prior) -> Tensor:
        """sum_j log(p_std / sigma_j) + (sigma_j^2 + (mu_j - p_mean)^2) / (2 p_std^2) - 1/2."""
        log_std = self.log_std.float()
        second_moment = (2 * log_std).exp() + (self.mean - prior.mean).square()
        return (math.log(prior.std) - log_std + second_moment / (2 * prior.std**2) - 0.5).sum()

    @torch.no_grad()
    def kl_gradient(self, prior: Prior) -> dict[str, Tensor]:
        mean = self.log_mean.float().exp()
        variance = (2 * self.log_std.float()).exp()
        return {
            "log_mean": mean * (mean - prior.mean) / prior.std**2,
            "log_std": variance / prior.std**2 - 1,
        }
