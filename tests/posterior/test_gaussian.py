"""Shapes of covariances and reparameterised draws."""

import pytest
import torch
from gaussians import arbitrary, both

from scalabl.posterior import FullGaussian, Prior
from scalabl.posterior.gaussian import POSTERIORS


@both
@pytest.mark.parametrize("seed", range(5))
def test_every_parameter_value_gives_a_positive_definite_covariance_and_positive_means(kind: str, seed: int) -> None:
    posterior = arbitrary(kind, r=6, seed=seed, spread=1.0)
    covariance = posterior.covariance().detach()
    assert torch.allclose(covariance, covariance.T)
    torch.linalg.cholesky(covariance)  # raises where it is not positive definite
    assert (posterior.mean > 0).all()
    assert torch.allclose(posterior.marginal_std(), covariance.diagonal().sqrt(), rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_extreme_parameters_leave_the_full_posterior_a_cholesky_factor(seed: int) -> None:
    """A lower triangle with a positive diagonal: its square is positive definite, whatever float32 makes of it."""
    posterior = arbitrary("full", r=6, seed=seed, spread=10.0)
    assert isinstance(posterior, FullGaussian)
    factor = posterior.cholesky()
    assert torch.equal(factor, factor.tril()) and (factor.diagonal() > 0).all()
    assert posterior.kl(Prior()).isfinite()


def test_the_full_posterior_reaches_every_covariance() -> None:
    """Set L from a given covariance and read the covariance back."""
    factor = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    wanted = factor @ factor.T + 0.1 * torch.eye(4)
    lower = torch.linalg.cholesky(wanted)
    posterior = FullGaussian(torch.ones(4), torch.ones(4))
    rows, columns = torch.tril_indices(4, 4, offset=-1)
    with torch.no_grad():
        posterior.log_std.copy_(lower.diagonal().log())
        posterior.lower.copy_(lower[rows, columns])
    assert torch.allclose(posterior.covariance(), wanted, atol=1e-5)


@pytest.mark.parametrize(("kind", "numbers"), [("diagonal", 16), ("full", 44)])
def test_parameter_counts_at_r_8(kind: str, numbers: int) -> None:
    """2 r and r (r + 3) / 2 numbers a layer."""
    assert sum(p.numel() for p in arbitrary(kind, r=8).parameters()) == numbers


@both
def test_reparameterised_draws_have_the_posteriors_moments(kind: str) -> None:
    posterior, n = arbitrary(kind, r=4), 200_000
    s = posterior.sample(torch.randn(n, 4, generator=torch.Generator().manual_seed(2))).detach()
    std = posterior.marginal_std()
    assert ((s.mean(dim=0) - posterior.mean).abs() < 5 * std / n**0.5).all()
    # standard error of a covariance of n Gaussian draws: sqrt((c_ii c_jj + c_ij^2) / n)
    covariance = posterior.covariance()
    error = ((std.square()[:, None] * std.square() + covariance.square()) / n).sqrt()
    assert ((s.T.cov() - covariance).abs() < 5 * error).all()


@both
def test_zero_noise_is_the_mean_and_any_leading_shape_is_kept(kind: str) -> None:
    posterior = arbitrary(kind, r=3)
    assert torch.equal(posterior.sample(torch.zeros(3)), posterior.mean)
    noise = torch.randn(2, 5, 3)
    assert posterior.sample(noise).shape == (2, 5, 3)
    assert torch.allclose(posterior.sample(noise)[1, 4], posterior.sample(noise[1, 4]))


@both
def test_draws_are_differentiable_in_every_parameter(kind: str) -> None:
    posterior = arbitrary(kind)
    posterior.sample(torch.randn(16, 5, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().min() > 0 for parameter in posterior.parameters())


@both
def test_it_starts_at_mean_and_std_without_correlations(kind: str) -> None:
    mean, std = torch.rand(5) + 0.1, torch.rand(5) + 0.1
    posterior = POSTERIORS[kind](mean, std)
    assert torch.allclose(posterior.mean, mean) and torch.allclose(posterior.covariance(), torch.diag(std.square()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_float32_whatever_they_start_from(dtype: torch.dtype) -> None:
    for posterior in (kind(torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype)) for kind in POSTERIORS.values()):
        assert all(parameter.dtype == torch.float32 for parameter in posterior.parameters())
