"""The prior over the r numbers s of a layer, p(s) = N(mean, std^2 I), and the posterior, q(s) = N(mean, scale scale^T).

    diagonal   N(s_mu, diag(s_sigma^2)): the paper's posterior, 2 r numbers a layer
    full       N(s_mu, L L^T), L lower triangular with a positive diagonal: r (r + 3) / 2 numbers a layer

Means are logarithms, as in the paper (s_mu = exp(log s_mu)): they stay positive, as the singular values they start
from. All parameters are float32 whatever the model's own precision is, and stay so when a model is moved to another
one: in bfloat16, of 8 bits, a step of 2e-2 on log s near 1 would be rounded away. The paper's full covariance is
parametrised by eigenvalues and eigenvectors; the Cholesky factor spans the same set of covariances, is positive
definite by construction, and needs no orthogonality to be kept up.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.core.modules import gathered


@dataclass(frozen=True)
class Prior:
    """Isotropic Gaussian prior over s [ScalaBL, section on the objective: N(0, 1)].

    Args:
        mean: the prior mean of each s_j.
        std: the prior standard deviation of each s_j, positive.
        empirical: take for each layer the standard deviation of the highest ELBO instead of `std` (empirical Bayes,
            type-II maximum likelihood). KL(q || p) is smallest at std^2 = mean_j (sigma_j^2 + (mu_j - mean)^2), and
            there depends on mu / sigma alone: neither s nor B pays for the scale that they share.

    Raises:
        UserError: `std` is not positive or a value is not finite.
    """

    mean: float = 0.0
    std: float = 1.0
    empirical: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std > 0):
            raise UserError(f"The prior std must be a positive number, but it is {self.std}; 0.2 is the default.")
        if not math.isfinite(self.mean):
            raise UserError(f"The prior mean must be a finite number, but it is {self.mean}; 0.577 is the default.")

    def variance(self, mean: Tensor, variance: Tensor) -> Tensor:
        """std^2 for a posterior of these means and variances (r,): a scalar, differentiable if empirical."""
        if not self.empirical:
            return torch.full((), self.std**2, dtype=torch.float32, device=mean.device)
        moment = (variance + (mean - self.mean).square()).mean()
        return gathered(moment)  # shards hold a part of the sum


class Gaussian(nn.Module, ABC):
    """A Gaussian over the r numbers of one layer.

    Args:
        mean: (r,) initial mean, positive.
        std: (r,) initial standard deviation of each number, positive.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.log_mean = nn.Parameter(mean.detach().float().log())
        self.log_std = nn.Parameter(std.detach().float().log())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `module.to(dtype)`, `.half()` and `.bfloat16()` call: devices change, the precision does not."""

        def keep_precision(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.dtype == torch.float32 else tensor.to(made.device, torch.float32)

        return super()._apply(keep_precision, recurse)

    @property
    def r(self) -> int:
        return self.log_mean.shape[0]

    @property
    def mean(self) -> Tensor:
        """(r,) mean of s."""
        return self.log_mean.float().exp()

    @abstractmethod
    def covariance(self) -> Tensor:
        """(r, r) covariance of s."""

    @abstractmethod
    def marginal_std(self) -> Tensor:
        """(r,) standard deviation of each number on its own."""

    @abstractmethod
    def perturb(self, noise: Tensor) -> Tensor:
        """The reparameterised draw: standard normal noise (..., r) -> s - mean, of the same shape."""

    def sample(self, noise: Tensor) -> Tensor:
        """s = mean + scale noise, of shape (..., r), differentiable in the posterior's parameters."""
        return self.mean + self.perturb(noise)

    @abstractmethod
    def kl(self, prior: Prior) -> Tensor:
        """KL(q || p) in nats, a scalar."""

    @abstractmethod
    def kl_gradient(self, prior: Prior) -> dict[str, Tensor]:
        """The gradient of `kl` in closed form, by parameter name; elementwise, so that it holds for shards too."""


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


@torch.no_grad()
def forward_kl_gradient(posterior: DiagonalGaussian, prior: Prior) -> dict[str, Tensor]:
    """The gradient of KL(p || q), the direction of the reference code's diagonal model, by parameter name: an ablation.

    KL(p || q) = sum_j log(sigma_j / p_std) + (p_std^2 + (p_mean - mu_j)^2) / (2 sigma_j^2) - 1/2. It asks q to cover
    the prior and is no bound on anything: it drives sigma up to |mu - p_mean| and beyond whatever the data say. Its
    prior is fixed: `Prior.empirical` belongs to KL(q || p).
    """
    mean, variance = posterior.mean, posterior.std.square()
    shift = mean - prior.mean
    return {"log_mean": mean * shift / variance, "log_std": 1 - (prior.std**2 + shift.square()) / variance}


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


def exact_products(like: Tensor) -> AbstractContextManager[Any]:
    """Context without automatic mixed precision on a tensor's device; the meta device has none."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


POSTERIORS: dict[str, type[Gaussian]] = {"diagonal": DiagonalGaussian, "full": FullGaussian}
