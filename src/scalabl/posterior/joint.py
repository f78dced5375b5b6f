"""A Gaussian over the numbers s of all layers together: N(s_mu, C C^T), C lower triangular, D x D for D numbers.

D is a few hundred to a few thousand, so that the covariance between layers can be kept exactly, which no method over
all of A and B can afford. The means stay in the layers' own posteriors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from scalabl.core.errors import UserError

Structure = Literal["joint", "layer", "diagonal"]
Kept = Literal["marginal", "conditional"]
STRUCTURES, KEPT = ("joint", "layer", "diagonal"), ("marginal", "conditional")


@dataclass(frozen=True)
class JointGaussian:
    """The joint covariance of s, by layers.

    Attributes:
        factor: C, (D, D) lower triangular with a positive diagonal, float32.
        ranks: the layers in the order of C's rows -> how many numbers each has; they sum to D.

    Raises:
        UserError: sizes do not fit.
    """

    factor: Tensor
    ranks: Mapping[str, int]

    def __post_init__(self) -> None:
        size = sum(self.ranks.values())
        if self.factor.shape != (size, size):
            raise UserError(
                f"A joint covariance over {size} numbers needs a factor of {size} x {size}, but it is "
                f"{' x '.join(map(str, self.factor.shape))}."
            )

    @classmethod
    def from_precision(cls, eigenvalues: Tensor, vectors: Tensor, ranks: Mapping[str, int]) -> JointGaussian:
        """The Gaussian of precision V diag(eigenvalues) V^T, the eigenvalues (D,) positive.

        C^T is the R of a QR decomposition of diag(eigenvalues)^-1/2 V^T: no product is formed whose rounding could
        make the covariance indefinite.
        """
        upper = torch.linalg.qr(vectors.T / eigenvalues.sqrt()[:, None]).R
        return cls((upper * upper.diagonal().sign()[:, None]).T.float().contiguous(), dict(ranks))

    @property
    def size(self) -> int:
        """D."""
        return self.factor.shape[0]

    def covariance(self) -> Tensor:
        """(D, D), float64."""
        factor = self.factor.double()
        return factor @ factor.T

    def kl(self, other: JointGaussian) -> float:
        """KL(self || other) in nats, both around the same mean and with the layers in the same order.

        (tr(S'^-1 S) - D + log det S' - log det S) / 2. For the restrictions q of a Gaussian p that `restricted` makes,
        the marginal ones have the smallest KL(p || q), the conditional ones the smallest KL(q || p).

        Raises:
            UserError: the layers are others.
        """
        if list(self.ranks.items()) != list(other.ranks.items()):
            raise UserError("The two covariances are over other layers, so there is no divergence between them.")
        own, its = self.factor.double(), other.factor.double()
        trace = torch.linalg.solve_triangular(its, own, upper=False).square().sum()
        log_ratio = (its.diagonal() / own.diagonal()).log().sum()
        return ((trace - self.size) / 2 + log_ratio).item()

    def to(self, device: torch.device | str) -> JointGaussian:
        """The same on another device."""
        return self if self.factor.device == torch.device(device) else replace(self, factor=self.factor.to(device))

    def blocks(self) -> Iterator[tuple[str, slice]]:
        """The layers with their rows of C."""
        start = 0
        for name, r in self.ranks.items():
            yield name, slice(start, start + r)
            start += r

    @cached_property
    def marginals(self) -> dict[str, Tensor]:
        """The layer's name -> the Cholesky factor (r, r) of its own covariance, float64."""
        return {name: _cholesky(self.factor[rows].double()) for name, rows in self.blocks()}

    def correlate(self, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Independent standard normal noise (N, r) by layer -> noise with the joint's correlations.

        What comes out is standard normal in every layer taken alone: pushed through the layer's own Cholesky factor
        (`marginals`) it is a draw of the joint, C z.
        """
        together = torch.cat([noise[name].double() for name in self.ranks], dim=1)
        shift = together @ self.factor.double().to(together.device).T
        return {
            name: torch.linalg.solve_triangular(self.marginals[name].to(shift.device), shift[:, rows].T, upper=False)
            .T.contiguous()
            .float()
            for name, rows in self.blocks()
        }

    def push_forward(self, jacobians: Mapping[str, Tensor]) -> Tensor:
        """J Sigma J^T of Jacobians (B, K, r) by layer: (B, K, K); layers without a Jacobian are known."""
        there = {name: rows for name, rows in self.blocks() if name in jacobians}
        factor = torch.cat([self.factor[rows] for rows in there.values()])
        root = torch.cat([jacobians[name] for name in there], dim=-1) @ factor
        return root @ root.transpose(1, 2)

    def restricted(self, structure: Structure, kept: Kept = "marginal") -> JointGaussian:
        """Without the correlations between layers ("layer"), or without any ("diagonal").

        Args:
            structure: what is kept; "joint" is all of it.
            kept: "marginal" keeps the blocks of the covariance, each layer's (number's) own uncertainty; "conditional"
                keeps the blocks of the precision, the uncertainty that is left where all others are known. The second
                is what a mean-field approximation finds, and never larger.

        Raises:
            UserError: there is no such structure.
        """
        if structure not in STRUCTURES or kept not in KEPT:
            raise UserError(
                f"The structure is {structure!r}, {kept!r}; it must be one of {', '.join(STRUCTURES)}, and "
                f"{' or '.join(KEPT)}."
            )
        if structure == "joint":
            return self
        matrix = self.covariance() if kept == "marginal" else torch.cholesky_inverse(self.factor.double())
        blocks = (
            [rows for _, rows in self.blocks()] if structure == "layer" else [slice(i, i + 1) for i in range(self.size)]
        )
        factor = torch.zeros_like(matrix)
        for rows in blocks:
            block = matrix[rows, rows]
            factor[rows, rows] = torch.linalg.cholesky(block if kept == "marginal" else torch.linalg.inv(block))
        return replace(self, factor=factor.float())


def _cholesky(root: Tensor) -> Tensor:
    """The Cholesky factor of root root^T, without the product: (r, D) -> (r, r)."""
    upper = torch.linalg.qr(root.T).R
    return (upper * upper.diagonal().sign()[:, None]).T
