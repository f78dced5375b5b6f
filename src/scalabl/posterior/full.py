"""q(s) = N(s_mu, L L^T), L lower triangular with a positive diagonal: r (r + 3) / 2 numbers a layer.

The paper's full covariance is parametrised by eigenvalues and eigenvectors; the Cholesky factor spans the same set
of covariances, is positive definite by construction, and needs no orthogonality to be kept up.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from scalabl.posterior.gaussian import Gaussian
from scalabl.posterior.prior import Prior


class FullGaussian(Gaussian):
    """A Gaussian with every covariance. `log_std` is the logarithm of the diagonal of L; `lower` is what is below.

    Args:
        mean: (r,) initial mean, positive.
        std: (r,) initial standard deviation, positive; it starts without correlations.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__(mean, std)
        r = mean.shape[0]
        self.lower = nn.Parameter(torch.zeros(r * (r - 1) // 2, device=mean.device))

    def cholesky(self) -> Tensor:
        """(r, r) the factor L."""
        rows, columns = torch.tril_indices(self.r, self.r, offset=-1, device=self.lower.device)
        below = torch.zeros(self.r, self.r, device=self.lower.device).index_put((rows, columns), self.lower.float())
        return torch.diag(self.log_std.float().exp()) + below

    def covariance(self) -> Tensor:
        factor = self.cholesky()
        with exact_products(factor):
            return factor @ factor.T

    def marginal_std(self) -> Tensor:
        return self.cholesky().square().sum(dim=1).sqrt()

    def perturb(self, noise: Tensor) -> Tensor:
        # automatic mixed precision would multiply these few numbers in bfloat16
        with exact_products(noise):
            return noise @ self.cholesky().T

    def kl(self, prior: Prior) -> Tensor:
        """(tr(L L^T) + |mu - p_mean|^2) / (2 p_std^2) - r/2 + r log p_std - sum_j log L_jj."""
        log_diagonal, mean = self.log_std.float(), self.mean
        variance = self.marginal_std().square()
        prior_variance = prior.variance(mean, variance)
        moment = (variance + (mean - prior.mean).square()).sum()
        log_ratio = self.r * prior_variance.log() / 2 - log_diagonal.sum()
        return moment / (2 * prior_variance) - self.r / 2 + log_ratio

    @torch.no_grad()
    def kl_gradient(self, prior: Prior) -> dict[str, Tensor]:
        mean = self.log_mean.float().exp()
        diagonal_squared = (2 * self.log_std.float()).exp()
        # an empirical prior takes the trace of L L^T alone, a sum over the numbers of L however they are sharded
        below = self.lower.float().square().sum() / self.r if prior.empirical else 0.0
        prior_variance = prior.variance(mean, diagonal_squared + below)
        return {
            "log_mean": mean * (mean - prior.mean) / prior_variance,
            "log_std": diagonal_squared / prior_variance - 1,
            "lower": self.lower.float() / prior_variance,
        }

    @torch.no_grad()
    def reset(self, mean: Tensor, std: Tensor) -> None:
        super().reset(mean, std)
        self.lower.zero_()


def exact_products(like: Tensor) -> AbstractContextManager[Any]:
    """Context without automatic mixed precision on a tensor's device; the meta device has none."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
