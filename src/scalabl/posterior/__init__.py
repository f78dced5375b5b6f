"""The Gaussian over the r numbers s of a layer: diagonal or full, its prior, its KL divergence, its draws.

The mathematics alone: nothing here knows of transformers or PEFT.
"""

from scalabl.posterior.diagonal import DiagonalGaussian
from scalabl.posterior.draws import standard_normal
from scalabl.posterior.forward_kl import forward_kl, forward_kl_gradient
from scalabl.posterior.full import FullGaussian
from scalabl.posterior.gaussian import Gaussian
from scalabl.posterior.prior import Prior

POSTERIORS: dict[str, type[Gaussian]] = {"diagonal": DiagonalGaussian, "full": FullGaussian}

__all__ = [
    "POSTERIORS",
    "DiagonalGaussian",
    "FullGaussian",
    "Gaussian",
    "Prior",
    "forward_kl",
    "forward_kl_gradient",
    "standard_normal",
]
