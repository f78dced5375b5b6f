"""BLoB's leaf: A with a Gaussian on each of its numbers, flipped out over the rows of a batch while training.

    q(A) = prod_ij N(A_ij; M_ij, sigma_ij^2),   sigma = G^2                              [BLoB 2406.11675]

Training draws one E ~ N(0, 1)^(r x d_in) a pass and gives row b of the batch its own, nearly independent draw by two
sign vectors (flipout): (M + (sigma * E) * (t_b s_b^T)) x = M x + t_b * ((sigma * E) (s_b * x)).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalabl.posterior import Prior


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
    """x -> A x, with A drawn while training and at its mean otherwise.

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
        if not self.training:
            return mean
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
