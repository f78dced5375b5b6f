"""The prior p(s) = N(mean, std^2 I), the same for every one of the r numbers of a layer."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
            raise UserError(f"The prior std must be a positive number, but it is {self.std}; 1.0 is the usual choice.")
        if not math.isfinite(self.mean):
            raise UserError(f"The prior mean must be a finite number, but it is {self.mean}; 0.0 is the usual choice.")

    def variance(self, mean: Tensor, variance: Tensor) -> Tensor:
        """std^2 for a posterior of these means and variances (r,): a scalar, differentiable if empirical."""
        if not self.empirical:
            return torch.full((), self.std**2, dtype=torch.float32, device=mean.device)
        moment = (variance + (mean - self.mean).square()).mean()
        return gathered(moment)  # shards hold a part of the sum
