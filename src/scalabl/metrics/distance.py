"""How far a row lies from the training rows, in a space of features: the relative Mahalanobis distance.

Each class has a mean mu_c, all share a covariance S within classes; the background is one Gaussian of all rows, whose
covariance is that within classes plus that of their means: S0 = S + sum_c w_c (mu_c - mu_0)(mu_c - mu_0)^T, w_c the
share of rows of class c. With MD(z; mu, S) = (z - mu)^T S^-1 (z - mu),

    distance(z) = min_c MD(z; mu_c, S) - MD(z; mu_0, S0)

is how much better the nearest class explains a row than the rows as a whole do. S is shrunk towards a multiple of the
identity by as much as the number of rows asks for (OAS), so that few rows will do.

Sources: Lee et al. 2018 (1807.03888); Podolskiy et al. 2021 (2101.03778) for text; Ren et al. 2021 (2106.09022) for
the background; Chen et al. 2010 (0907.4698, eq. 23) for OAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scalabl.core.errors import UserError


def shrunk_covariance(centred: Tensor) -> Tensor:
    """The covariance (d, d) of centred rows (n, d), shrunk by OAS."""
    n, d = centred.shape
    sample = centred.T @ centred / n
    scale = sample.diagonal().mean()
    size = sample.square().mean()
    above, below = size + scale.square(), (n + 1) * (size - scale.square() / d)
    share = 1.0 if below <= above else float(above / below)
    return (1 - share) * sample + share * scale * torch.eye(d, dtype=sample.dtype)


@dataclass(frozen=True)
class FeatureDistance:
    """The distance of features (n, d) to the training rows (n,), as it lies on disk.

    Attributes:
        means: (C, d) of the classes.
        shares: (C,) of the training rows.
        factor: (d, d), L with L L^T = S^-1.
    """

    means: Tensor
    shares: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor) -> FeatureDistance:
        """From the features (n, d) of the training rows and their classes (n,); a class without rows is left out.

        Raises:
            UserError: features that are NaN or infinite.
        """
        rows, (found, place) = features.double(), labels.unique(return_inverse=True)
        if not rows.isfinite().all():
            raise UserError("The features of the training rows are NaN or infinite; lower --learning-rate.")
        counts = torch.bincount(place).double()
        means = torch.zeros(len(found), rows.shape[1], dtype=torch.float64).index_add_(0, place, rows) / counts[:, None]
        within = shrunk_covariance(rows - means[place])
        # a space that rows do not use at all must not make the inverse infinite
        within = within + 1e-9 * (within.diagonal().mean() + 1e-30) * torch.eye(len(within), dtype=torch.float64)
        factor = torch.linalg.inv(torch.linalg.cholesky(within)).T
        return cls(means.float(), (counts / counts.sum()).float(), factor.float().contiguous())

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> FeatureDistance:
        """What `tensors` gave, read from a disk.

        Raises:
            UserError: tensors of other names or sizes, or numbers that are NaN or infinite.
        """
        means, shares, factor = (tensors.get(name, torch.empty(0)) for name in ("means", "shares", "factor"))
        sizes = (len(shares), len(factor))
        if means.shape != sizes or shares.shape != sizes[:1] or factor.shape != (sizes[1], sizes[1]):
            raise UserError("The tensors are not means (C, d), shares (C,) and factor (d, d); train the run again.")
        if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in (means, shares, factor)):
            raise UserError("A tensor has no numbers, or some that are NaN or infinite; train the run again.")
        return cls(means, shares, factor)

    def tensors(self) -> dict[str, Tensor]:
        """What is kept on disk, for `of`."""
        return {"means": self.means, "shares": self.shares, "factor": self.factor}

    def __call__(self, features: Tensor) -> Tensor:
        """features (n, d) -> (n,), higher is further out of scope.

        Raises:
            UserError: features of another size than those that it was fitted on.
        """
        if features.shape[1] != len(self.factor):
            size, known = features.shape[1], len(self.factor)
            raise UserError(f"Features of {size} numbers are not of the model of these {known}; train the run again.")
        factor, shares = self.factor.double(), self.shares.double()
        centre = shares @ self.means.double()
        # where S is the identity: S0 = I + M^T M, whose inverse is I - M^T (I + M M^T)^-1 M
        rows, means = (features.double() - centre) @ factor, (self.means.double() - centre) @ factor
        weighted = shares.sqrt()[:, None] * means
        along = rows @ weighted.T
        inner = torch.eye(len(means), dtype=torch.float64) + weighted @ weighted.T
        explained = (along * torch.linalg.solve(inner, along.T).T).sum(dim=1)
        nearest = (means.square().sum(dim=1) - 2 * rows @ means.T).min(dim=1).values
        return nearest + explained  # |z|^2 is in both distances
