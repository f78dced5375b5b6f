"""A linear-Gaussian model, whose posterior is known: variational inference must find it.

    y = X s + noise,  noise ~ N(0, tau^2 I),  s ~ N(m, p^2 I)
    posterior: precision Lambda = X^T X / tau^2 + I / p^2, mean Lambda^-1 (X^T y / tau^2 + m / p^2)

The best diagonal Gaussian has the same mean and the variances 1 / Lambda_jj [Bishop, PRML, section 10.1.2].
"""

import pytest
import torch
from torch import Tensor

from scalabl.posterior import Gaussian, Prior
from scalabl.posterior.gaussian import POSTERIORS

R, ROWS, TAU = 3, 40, 0.5
PRIOR = Prior(mean=0.5, std=1.0)


def data() -> tuple[Tensor, Tensor]:
    """Correlated inputs, so that the posterior is far from diagonal, and a positive true s."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.6, 0.5], [0.0, 0.0, 0.9]])
    x = torch.randn(ROWS, R, generator=generator) @ mixing
    y = x @ torch.tensor([2.0, 1.5, 1.0]) + TAU * torch.randn(ROWS, generator=generator)
    return x, y


def exact() -> tuple[Tensor, Tensor]:
    """Mean and precision of the posterior."""
    x, y = data()
    precision = x.T @ x / TAU**2 + torch.eye(R) / PRIOR.std**2
    return torch.linalg.solve(precision, x.T @ y / TAU**2 + PRIOR.mean / PRIOR.std**2), precision


def fit(kind: str, *, closed_form_kl: bool) -> Gaussian:
    """Stochastic gradient descent on the negative ELBO with reparameterised draws."""
    x, y = data()
    posterior = POSTERIORS[kind](torch.ones(R), torch.full((R,), 0.3))
    optimizer = torch.optim.Adam(posterior.parameters(), lr=0.05)
    steps = 1500
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        half = torch.randn(64, R, generator=generator)
        s = posterior.sample(torch.cat([half, -half]))  # antithetic pairs: less noise, same expectation
        negative_log_likelihood = (y - s @ x.T).square().sum(dim=1).mean() / (2 * TAU**2)
        optimizer.zero_grad()
        (negative_log_likelihood if closed_form_kl else negative_log_likelihood + posterior.kl(PRIOR)).backward()
        if closed_form_kl:
            for name, gradient in posterior.kl_gradient(PRIOR).items():
                parameter = posterior.get_parameter(name)
                parameter.grad = parameter.grad + gradient
        optimizer.step()
        schedule.step()
    return posterior


def test_the_exact_posterior_is_a_hard_case() -> None:
    mean, precision = exact()
    covariance = precision.inverse()
    correlation = covariance / covariance.diagonal().sqrt().outer(covariance.diagonal().sqrt())
    assert (mean > 0.5).all(), "means are exp(log mean)"
    assert (correlation - torch.eye(R)).abs().max() > 0.5


@pytest.mark.parametrize("closed_form_kl", [True, False])
def test_full_finds_the_exact_posterior(closed_form_kl: bool) -> None:
    mean, precision = exact()
    covariance = precision.inverse()
    posterior = fit("full", closed_form_kl=closed_form_kl)
    std = covariance.diagonal().sqrt()
    assert ((posterior.mean - mean).abs() < 0.05 * std).all()
    assert ((posterior.covariance() - covariance).abs() < 0.05 * std.outer(std)).all()


@pytest.mark.parametrize("closed_form_kl", [True, False])
def test_diagonal_finds_the_mean_and_the_mean_field_variances(closed_form_kl: bool) -> None:
    mean, precision = exact()
    posterior = fit("diagonal", closed_form_kl=closed_form_kl)
    variance = 1 / precision.diagonal()
    assert ((posterior.mean - mean).abs() < 0.05 * variance.sqrt()).all()
    assert torch.allclose(posterior.covariance().diagonal(), variance, rtol=0.05)
    assert (variance < 0.8 * precision.inverse().diagonal()).any(), "mean field is narrower than the marginals"
