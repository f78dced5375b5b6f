"""Posteriors with arbitrary parameters, shared by the tests here."""

import pytest
import torch

from scalabl.posterior import Gaussian
from scalabl.posterior.gaussian import POSTERIORS

both = pytest.mark.parametrize("kind", list(POSTERIORS))


def arbitrary(kind: str, r: int = 5, seed: int = 0, spread: float = 0.5) -> Gaussian:
    """A posterior whose every parameter is random."""
    posterior = POSTERIORS[kind](torch.ones(r), torch.full((r,), 0.5))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return posterior


def as_distribution(posterior: Gaussian) -> torch.distributions.MultivariateNormal:
    """The same Gaussian in torch.distributions, in float64."""
    return torch.distributions.MultivariateNormal(
        posterior.mean.detach().double(), covariance_matrix=posterior.covariance().detach().double()
    )
