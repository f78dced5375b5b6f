"""BLoB as a PEFT tuner: a mean-field Gaussian on every number of A, kept, saved and merged as our own tuner is.

    q(A) = prod_ij N(A_ij; M_ij, sigma_ij^2),   sigma = G^2                              [BLoB 2406.11675]

Training draws one E ~ N(0, 1)^(r x d_in) a pass and gives row b of the batch its own, nearly independent draw by two
sign vectors (flipout): (M + (sigma * E) * (t_b s_b^T)) x = M x + t_b * ((sigma * E) (s_b * x)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.core.modules import split_leaf
from scalabl.posterior.gaussian import Prior
from scalabl.tuner.config import ScalaBLType, refuse_unsupported
from scalabl.tuner.layers import active_adapters, unwrap
from scalabl.tuner.model import ScalaBLModel

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


class ElementwiseScale(nn.Module):
    """G (r, d_in); the standard deviations are sigma = G^2.

    Args:
        shape: (r, d_in).
        eps: G starts as U(eps / sqrt(2), eps).
        device: of G.
    """

    def __init__(self, shape: torch.Size, eps: float, device: torch.device) -> None:
        super().__init__()
        low = eps / math.sqrt(2)
        self.g = nn.Parameter(low + (eps - low) * torch.rand(shape, device=device))

    @property
    def std(self) -> Tensor:
        """(r, d_in) standard deviations, float32."""
        return self.g.float().square()


class BLoBProjection(nn.Module):
    """x -> A x, with A drawn while it is trained and at its mean otherwise.

    Args:
        weight: (r, d_in) LoRA's own draw of A, where the mean starts.
        eps: G starts as U(eps / sqrt(2), eps).
    """

    def __init__(self, weight: Tensor, *, eps: float = 0.05) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().clone())
        self.posterior = ElementwiseScale(weight.shape, eps, weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, ..., d_in) -> (rows, ..., r); the first dimension counts sequences."""
        mean = F.linear(x, self.weight)
        if not (self.training and (self.weight.requires_grad or self.posterior.g.requires_grad)):
            return mean  # of a frozen adapter too
        between = [1] * (x.dim() - 2)
        s = _signs((x.shape[0], *between, self.in_features), x)
        t = _signs((x.shape[0], *between, self.out_features), x)
        noise = self.posterior.std.to(x.dtype) * torch.randn_like(self.weight, dtype=x.dtype)
        return mean + t * F.linear(s * x, noise)

    def kl(self, prior: Prior) -> Tensor:
        """KL(q || p) in nats: the sum of log(p_std / sigma) + (sigma^2 + (M - p_mean)^2) / (2 p_std^2) - 1/2."""
        std = self.posterior.std
        moment = std.square() + (self.weight.float() - prior.mean).square()
        return (math.log(prior.std) - std.log() + moment / (2 * prior.std**2) - 0.5).sum()

    @torch.no_grad()
    def kl_gradient(self, prior: Prior) -> tuple[Tensor, Tensor]:
        """The gradient of `kl` in closed form, on M and on G: (M - p_mean) / p_std^2 and 2 G^3 / p_std^2 - 2 / G."""
        g = self.posterior.g.float()
        return (self.weight.float() - prior.mean) / prior.std**2, 2 * g**3 / prior.std**2 - 2 / g

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _signs(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Independent fair signs."""
    return (2 * torch.randint(2, shape, device=like.device) - 1).to(like.dtype)


class BLoBModel(ScalaBLModel):
    """The leaf swap, the refusals and the base model's fingerprint are the ScalaBL tuner's; the leaf is BLoB's."""

    def _leaf(self, weight: Tensor, config: Any) -> nn.Module:
        return BLoBProjection(weight, eps=config.init_eps)


def blob_layers(model: nn.Module) -> dict[str, BLoBProjection]:
    """The BLoB leaves of the active adapter by the name of the layer they adapt.

    Raises:
        UserError: there is none.
    """
    model = unwrap(model)
    adapter = active_adapters(model)[0]
    found = {}
    for name, module in model.named_modules():
        layer, of = split_leaf(name)
        if isinstance(module, BLoBProjection) and of == adapter:
            found[layer] = module
    if not found:
        raise UserError("The model has no BLoB layer: make the adapter with BLoBConfig, or train with --method blob.")
    return found
