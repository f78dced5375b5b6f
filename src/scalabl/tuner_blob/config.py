"""BLoBConfig: LoraConfig with a Gaussian on A."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peft import LoraConfig

from scalabl.errors import UserError
from scalabl.posterior import Prior
from scalabl.tuner.config import ScalaBLType, refuse_unsupported

SCALABL_BLOB = ScalaBLType("SCALABL_BLOB")


@dataclass
class BLoBConfig(LoraConfig):
    """The configuration of a BLoB adapter.

    Args:
        prior_std: standard deviation of the prior N(0, prior_std^2) on each number of A [BLoB: 0.2].
        init_eps: G starts as U(init_eps / sqrt(2), init_eps), and sigma = G^2 [BLoB: 0.05].
        base_fingerprint: written when the adapter is made, checked when it is loaded onto a base model.

    Raises:
        UserError: a value out of range, or an option of LoRA that this tuner does not support.
    """

    prior_std: float = field(default=0.2, metadata={"help": "Standard deviation of the prior on each number of A."})
    init_eps: float = field(default=0.05, metadata={"help": "Upper end of the uniform initial G; sigma = G^2."})
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Identity of the base model that the adapter was trained on."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SCALABL_BLOB  # type: ignore[assignment]
        if not (math.isfinite(self.init_eps) and self.init_eps > 0):
            raise UserError(f"init_eps is {self.init_eps}; it must be positive, 0.05 is the paper's.")
        _ = self.prior
        refuse_unsupported(self)

    @property
    def prior(self) -> Prior:
        """The prior on each number of A, checked."""
        return Prior(0.0, self.prior_std)
