"""KL(p || q), the reference code's direction."""

import pytest
import torch
from gaussians import arbitrary
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from scalabl.posterior import DiagonalGaussian, Prior, forward_kl_gradient

PRIORS = [Prior(), Prior(std=0.2), Prior(mean=0.7, std=1.5), Prior(mean=-0.3, std=0.5)]


def posterior(r: int = 5, seed: int = 0) -> DiagonalGaussian:
    made = arbitrary("diagonal", r, seed)
    assert isinstance(made, DiagonalGaussian)
    return made


def forward_kl(q: DiagonalGaussian, prior: Prior) -> Tensor:
    return kl_divergence(Normal(prior.mean, prior.std), Normal(q.mean, q.std)).sum()


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("r", [1, 2, 5, 8])
def test_its_gradient_is_autograds_with_the_prior_first(prior: Prior, r: int) -> None:
    q = posterior(r, seed=r)
    forward_kl(q, prior).backward()
    gradient = forward_kl_gradient(q, prior)
    assert gradient.keys() == dict(q.named_parameters()).keys()
    for name, parameter in q.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-5, atol=1e-5)
        assert not gradient[name].requires_grad
    assert not torch.allclose(gradient["log_std"], q.kl_gradient(prior)["log_std"]), "the ELBO's is the other one"


@pytest.mark.parametrize("prior", PRIORS)
def test_at_a_fixed_mean_it_drives_sigma_to_prior_and_distance_together(prior: Prior) -> None:
    """Its minimiser over sigma is sqrt(p_std^2 + (mu - p_mean)^2); that of KL(q || p) is p_std, whatever the mean."""
    mean = posterior().mean.detach()
    wanted = (prior.std**2 + (mean - prior.mean).square()).sqrt()
    for minimiser, kl, gradient in (
        (wanted, forward_kl, forward_kl_gradient),
        (torch.full_like(wanted, prior.std), DiagonalGaussian.kl, DiagonalGaussian.kl_gradient),
    ):
        best = DiagonalGaussian(mean, minimiser)
        assert gradient(best, prior)["log_std"].abs().max() < 1e-5
        for factor in (0.8, 1.25):
            assert kl(DiagonalGaussian(mean, factor * minimiser), prior).item() > kl(best, prior).item() + 0.01


def test_it_is_zero_at_the_prior_and_only_there() -> None:
    q = DiagonalGaussian(torch.full((3,), 0.5), torch.full((3,), 0.2))
    assert all(part.abs().max() < 1e-5 for part in forward_kl_gradient(q, Prior(0.5, 0.2)).values())
    torch.testing.assert_close(forward_kl_gradient(q, Prior(0.5, 0.21))["log_std"], torch.full((3,), 1 - 1.05**2))
