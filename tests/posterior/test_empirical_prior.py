"""The empirical prior: the std of the highest ELBO, layer by layer."""

import math

import pytest
import torch
from gaussians import arbitrary, both

from scalabl.posterior import DiagonalGaussian, Gaussian, Prior
from scalabl.posterior.gaussian import POSTERIORS

EMPIRICAL = [Prior(empirical=True), Prior(mean=0.7, empirical=True), Prior(mean=-0.4, std=3.0, empirical=True)]


def best_std(posterior: Gaussian, prior: Prior) -> float:
    """sqrt(mean_j E_q[(s_j - p_mean)^2])."""
    moment = posterior.covariance().diagonal() + (posterior.mean - prior.mean).square()
    return moment.mean().sqrt().item()


@both
@pytest.mark.parametrize("prior", EMPIRICAL)
@pytest.mark.parametrize("r", [1, 5, 8])
def test_the_kl_is_that_of_the_best_fixed_prior(kind: str, prior: Prior, r: int) -> None:
    posterior = arbitrary(kind, r, seed=r)
    best, kl = best_std(posterior, prior), posterior.kl(prior)
    assert kl.shape == ()
    assert kl.item() == pytest.approx(posterior.kl(Prior(prior.mean, best)).item(), rel=1e-5, abs=1e-6)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert posterior.kl(Prior(prior.mean, factor * best)) > kl + 1e-4


@both
@pytest.mark.parametrize("prior", EMPIRICAL)
def test_the_gradient_is_autograds_through_the_prior_and_that_at_the_prior_held_fixed(kind: str, prior: Prior) -> None:
    """At the best std the KL is flat in it, so that what std itself gains by a step adds nothing (the envelope)."""
    posterior = arbitrary(kind)
    moment = posterior.marginal_std().square() + (posterior.mean - prior.mean).square()
    through = torch.autograd.grad(moment.mean(), list(posterior.parameters()))
    assert all(gradient.abs().max() > 1e-3 for gradient in through), "the prior does depend on every parameter"

    posterior.kl(prior).backward()
    gradient = posterior.kl_gradient(prior)
    fixed = posterior.kl_gradient(Prior(prior.mean, best_std(posterior, prior)))
    assert gradient.keys() == dict(posterior.named_parameters()).keys()
    for name, parameter in posterior.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient[name], fixed[name], rtol=1e-4, atol=1e-6)
        assert not gradient[name].requires_grad


@both
@pytest.mark.parametrize("c", [0.01, 3.0, 100.0])
def test_neither_the_kl_nor_its_gradient_sees_the_scale_of_s(kind: str, c: float) -> None:
    prior, posterior, scaled = Prior(empirical=True), arbitrary(kind), arbitrary(kind)
    with torch.no_grad():
        scaled.log_mean.add_(math.log(c))
        scaled.log_std.add_(math.log(c))
        if hasattr(scaled, "lower"):
            scaled.lower.mul_(c)
    assert scaled.kl(prior).item() == pytest.approx(posterior.kl(prior).item(), rel=1e-5)
    before, after = posterior.kl_gradient(prior), scaled.kl_gradient(prior)
    for name in ("log_mean", "log_std"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-5)
    # log mean and log std moved together: nothing is gained along the scale
    assert (before["log_mean"] + before["log_std"]).sum().item() == pytest.approx(
        -(before["lower"] * posterior.lower).sum().item() if kind == "full" else 0.0,  # type: ignore[operator]
        abs=1e-5,
    )
    fixed = Prior()
    assert scaled.kl(fixed).item() != pytest.approx(posterior.kl(fixed).item(), rel=0.1), "a fixed prior does see it"


@both
@pytest.mark.parametrize(("mean", "std"), [(1.0, 1.0), (0.3, 0.05), (0.01, 2.0)])
def test_of_one_number_it_is_a_function_of_the_signal_to_noise_ratio_alone(kind: str, mean: float, std: float) -> None:
    """r = 1: KL = 1/2 log(1 + mu^2 / sigma^2)."""
    posterior = POSTERIORS[kind](torch.tensor([mean]), torch.tensor([std]))
    expected = math.log1p((mean / std) ** 2) / 2
    assert posterior.kl(Prior(empirical=True)).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_full_posterior_without_correlations_is_the_diagonal_one() -> None:
    prior, diagonal = Prior(0.2, empirical=True), arbitrary("diagonal")
    full = POSTERIORS["full"](diagonal.mean, diagonal.marginal_std())
    torch.testing.assert_close(full.kl(prior), diagonal.kl(prior))
    of_full, of_diagonal = full.kl_gradient(prior), diagonal.kl_gradient(prior)
    for name, gradient in of_diagonal.items():
        torch.testing.assert_close(of_full[name], gradient)
    assert not of_full["lower"].any()


def test_the_variance_of_a_fixed_prior_does_not_depend_on_the_posterior() -> None:
    posterior = arbitrary("diagonal")
    assert isinstance(posterior, DiagonalGaussian)
    variance = Prior(std=0.3).variance(posterior.mean, posterior.std.square())
    assert variance.item() == pytest.approx(0.09) and not variance.requires_grad
