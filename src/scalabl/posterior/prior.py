"""The prior p(s) = N(mean, std^2 I), the same for every one of the r numbers of a layer."""

import math
from dataclasses import dataclass

from scalabl.errors import UserError


@dataclass(frozen=True)
class Prior:
    """Isotropic Gaussian prior over s [ScalaBL, section on the objective: N(0, 1)].

    Args:
        mean: the prior mean of each s_j.
        std: the prior standard deviation of each s_j, positive.

    Raises:
        UserError: `std` is not positive or a value is not finite.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std > 0):
            raise UserError(f"The prior std must be a positive number, but it is {self.std}; 1.0 is the usual choice.")
        if not math.isfinite(self.mean):
            raise UserError(f"The prior mean must be a finite number, but it is {self.mean}; 0.0 is the usual choice.")
