"""The closed-form KL and its gradient, against torch.distributions, Monte Carlo and autograd."""

import math

import pytest
import torch
from gaussians import arbitrary, as_distribution, both

from scalabl.core.errors import UserError
from scalabl.posterior import Prior
from scalabl.posterior.gaussian import POSTERIORS

PRIORS = [Prior(), Prior(std=0.2), Prior(mean=0.7, std=1.5), Prior(mean=-0.3, std=0.5)]


def isotropic(prior: Prior, r: int) -> torch.distributions.MultivariateNormal:
    return torch.distributions.MultivariateNormal(
        torch.full((r,), prior.mean, dtype=torch.double), covariance_matrix=prior.std**2 * torch.eye(r).double()
    )


@both
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("r", [1, 2, 8])
def test_kl_is_that_of_torch_distributions(kind: str, prior: Prior, r: int) -> None:
    posterior = arbitrary(kind, r, seed=r)
    exact = torch.distributions.kl_divergence(as_distribution(posterior), isotropic(prior, r))
    kl = posterior.kl(prior)
    assert kl.shape == ()
    assert kl.item() == pytest.approx(exact.item(), rel=1e-5)


@both
def test_kl_is_the_mean_log_ratio_of_draws(kind: str) -> None:
    """KL(q || p) = E_q[log q - log p], and not the other direction."""
    prior, posterior = Prior(mean=0.5, std=0.8), arbitrary(kind)
    noise = torch.randn(200_000, posterior.r, generator=torch.Generator().manual_seed(1))
    s = posterior.sample(noise).detach().double()
    ratio = as_distribution(posterior).log_prob(s) - isotropic(prior, posterior.r).log_prob(s)
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - posterior.kl(prior)) < 5 * error
    other_direction = torch.distributions.kl_divergence(isotropic(prior, posterior.r), as_distribution(posterior))
    assert abs(ratio.mean() - other_direction) > 20 * error


@both
@pytest.mark.parametrize("prior", PRIORS)
def test_kl_gradient_is_autograds(kind: str, prior: Prior) -> None:
    posterior = arbitrary(kind)
    posterior.kl(prior).backward()
    gradient = posterior.kl_gradient(prior)
    assert gradient.keys() == dict(posterior.named_parameters()).keys()
    for name, parameter in posterior.named_parameters():
        assert torch.allclose(gradient[name], parameter.grad, rtol=1e-5, atol=1e-6), name
        assert not gradient[name].requires_grad


@both
@pytest.mark.parametrize("prior", [Prior(mean=1.0, std=1.0), Prior(mean=0.3, std=0.2)])
def test_kl_is_zero_at_the_prior_and_only_there(kind: str, prior: Prior) -> None:
    r = 6
    at_prior = POSTERIORS[kind](torch.full((r,), prior.mean), torch.full((r,), prior.std))
    assert at_prior.kl(prior).item() == pytest.approx(0.0, abs=1e-5)
    assert all(gradient.abs().max() < 1e-5 for gradient in at_prior.kl_gradient(prior).values())
    for parameter in at_prior.parameters():
        for step in (-0.1, 0.1):
            with torch.no_grad():
                parameter[0] += step
            assert at_prior.kl(prior) > 1e-4
            with torch.no_grad():
                parameter[0] -= step


def test_a_full_posterior_without_correlations_has_the_diagonals_kl() -> None:
    diagonal = arbitrary("diagonal")
    full = POSTERIORS["full"](diagonal.mean, diagonal.marginal_std())
    prior = Prior(0.2, 0.7)
    assert torch.allclose(full.kl(prior), diagonal.kl(prior))
    assert torch.allclose(full.covariance(), diagonal.covariance())


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_a_prior_std_that_is_not_positive_is_refused(std: float) -> None:
    with pytest.raises(UserError, match="prior std must be a positive number"):
        Prior(std=std)


@pytest.mark.parametrize("mean", [math.nan, -math.inf])
def test_a_prior_mean_that_is_not_finite_is_refused(mean: float) -> None:
    with pytest.raises(UserError, match="prior mean must be a finite number"):
        Prior(mean=mean)
