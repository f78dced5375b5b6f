"""What every posterior over s can do: q(s) = N(mean, scale scale^T) with s in R^r.

Means are held as logarithms, as in the paper (s_mu = exp(log s_mu)): they stay positive, as the singular values
they start from. All parameters are float32 whatever the model's own precision is, and stay so when a model is moved
to another one: in bfloat16, of 8 bits, a step of 2e-2 on log s near 1 would be rounded away.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from scalabl.posterior.prior import Prior


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

    @torch.no_grad()
    def reset(self, mean: Tensor, std: Tensor) -> None:
        """Set mean (r,) and standard deviations (r,), without correlations."""
        self.log_mean.copy_(mean.log())
        self.log_std.copy_(std.log())
