"""KL(p || q), the reference code's direction."""

import math

import pytest
import torch
from gaussians import arbitrary, as_distribution

from scalabl.posterior import DiagonalGaussian, Prior, forward_kl, forward_kl_gradient

PRIORS = [Prior(), Prior(std=0.2), Prior(mean=0.7, std=1.5), Prior(mean=-0.3, std=0.5)]


def posterior(r: int = 5, seed: int = 0) -> DiagonalGaussian:
    made = arbitrary("diagonal", r, seed)
    assert isinstance(made, DiagonalGaussian)
    return made


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("r", [1, 2, 8])
def test_it_is_torchs_with_the_prior_first(prior: Prior, r: int) -> None:
    q = posterior(r, seed=r)
    p = torch.distributions.MultivariateNormal(
        torch.full((r,), prior.mean).double(), covariance_matrix=prior.std**2 * torch.eye(r).double()
    )
    kl = forward_kl(q, prior)
    assert kl.shape == ()
    assert kl.item() == pytest.approx(torch.distributions.kl_divergence(p, as_distribution(q)).item(), rel=1e-5)
    assert kl.item() != pytest.approx(q.kl(prior).item(), rel=1e-2), "the ELBO's is the other one"


@pytest.mark.parametrize("prior", PRIORS)
def test_its_gradient_is_autograds(prior: Prior) -> None:
    q = posterior()
    forward_kl(q, prior).backward()
    gradient = forward_kl_gradient(q, prior)
    assert gradient.keys() == dict(q.named_parameters()).keys()
    for name, parameter in q.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-5, atol=1e-5)
        assert not gradient[name].requires_grad


@pytest.mark.parametrize("prior", PRIORS)
def test_at_a_fixed_mean_it_drives_sigma_to_prior_and_distance_together(prior: Prior) -> None:
    """Its minimiser over sigma is sqrt(p_std^2 + (mu - p_mean)^2); that of KL(q || p) is p_std, whatever the mean."""
    q = posterior()
    wanted = (prior.std**2 + (q.mean.detach() - prior.mean).square()).sqrt()
    for minimiser, kl, gradient in (
        (wanted, forward_kl, forward_kl_gradient),
        (torch.full_like(wanted, prior.std), DiagonalGaussian.kl, DiagonalGaussian.kl_gradient),
    ):
        q.reset(q.mean.detach(), minimiser)
        assert gradient(q, prior)["log_std"].abs().max() < 1e-5
        lowest = kl(q, prior).item()
        for factor in (0.8, 1.25):
            q.reset(q.mean.detach(), factor * minimiser)
            assert kl(q, prior).item() > lowest + 0.01


def test_it_is_zero_at_the_prior_and_only_there() -> None:
    q = DiagonalGaussian(torch.full((3,), 0.5), torch.full((3,), 0.2))
    assert forward_kl(q, Prior(0.5, 0.2)).item() == pytest.approx(0.0, abs=1e-6)
    assert forward_kl(q, Prior(0.5, 0.21)).item() == pytest.approx(
        3 * (math.log(0.2 / 0.21) + 0.21**2 / (2 * 0.2**2) - 0.5), rel=1e-4
    )
