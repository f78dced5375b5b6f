"""q(s) = N(s_mu, diag(s_sigma^2)): the paper's posterior, 2 r numbers a layer."""

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
        log_std, mean = self.log_std.float(), self.mean
        variance = (2 * log_std).exp()
        prior_variance = prior.variance(mean, variance)
        second_moment = variance + (mean - prior.mean).square()
        return (prior_variance.log() / 2 - log_std + second_moment / (2 * prior_variance) - 0.5).sum()

    @torch.no_grad()
    def kl_gradient(self, prior: Prior) -> dict[str, Tensor]:
        mean = self.log_mean.float().exp()
        variance = (2 * self.log_std.float()).exp()
        prior_variance = prior.variance(mean, variance)
        return {
            "log_mean": mean * (mean - prior.mean) / prior_variance,
            "log_std": variance / prior_variance - 1,
        }
