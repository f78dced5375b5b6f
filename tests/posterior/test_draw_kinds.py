"""Antithetic, quasi-Monte Carlo and moment-matched draws: their identities, their laws, and what they gain."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.posterior import standard_normal
from scalabl.posterior.draws import KINDS, noise
from scalabl.predictive.sampling import DRAWS

LAYERS = {"model.layers.0.q_proj": 4, "model.layers.0.v_proj": 3, "lm_head": 6}


def together(kind: str, samples: int, seed: int = 0, layers: dict[str, int] = LAYERS) -> Tensor:
    """(N, D) in float64."""
    return torch.cat(list(noise(kind, samples, layers, seed).values()), dim=1).double()


def test_the_kinds_are_those_that_can_be_asked_for() -> None:
    assert tuple(KINDS) == DRAWS


@pytest.mark.parametrize("kind", DRAWS)
def test_a_layer_reads_its_own_numbers_and_a_seed_gives_them_again(kind: str) -> None:
    before = torch.random.get_rng_state()
    found = noise(kind, 8, LAYERS, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {name: (tuple(z.shape), z.dtype) for name, z in found.items()} == {
        name: ((8, r), torch.float32) for name, r in LAYERS.items()
    }
    torch.manual_seed(7)
    again, other = noise(kind, 8, LAYERS, 5), noise(kind, 8, LAYERS, 6)
    for name, z in found.items():
        assert torch.equal(z, again[name]) and z.isfinite().all()
        assert (z - other[name]).abs().max() > 0.1
    # no layer repeats another's numbers
    assert len(torch.unique(together(kind, 8).abs().round(decimals=5))) >= 4 * sum(LAYERS.values())


def test_independent_draws_are_the_particles_of_the_stream() -> None:
    for name, z in noise("independent", 9, LAYERS, 3).items():
        assert torch.equal(z[7], standard_normal([7], LAYERS[name], seed=3, stream=name)[0])


@pytest.mark.parametrize("samples", [8, 9])
def test_antithetic_pairs_sum_to_zero(samples: int) -> None:
    pairs = together("antithetic", samples)[:8].view(4, 2, -1)
    assert torch.equal(pairs.sum(dim=1), torch.zeros(4, pairs.shape[-1], dtype=torch.float64))
    assert torch.equal(pairs[:, 0], together("independent", 4))


@pytest.mark.parametrize("kind", ["independent", "antithetic", "sobol"])
def test_fewer_particles_are_the_first_ones_of_more(kind: str) -> None:
    assert torch.equal(together(kind, 5), together(kind, 16)[:5])


@pytest.mark.parametrize("seed", range(3))
def test_sobol_points_visit_every_cell_once(seed: int) -> None:
    layers = {"a": 300, "b": 200}
    uniform = torch.special.ndtr(together("sobol", 32, seed, layers))
    cells = (uniform * 32).floor().sort(dim=0).values
    assert torch.equal(cells, torch.arange(32.0, dtype=torch.float64)[:, None].expand(-1, 500))


def test_moments_are_exact() -> None:
    for samples in (2, 3, 5, 7, 16):
        for seed in range(5):
            for z in noise("moments", samples, LAYERS, seed).values():
                z = z.double()
                assert z.mean(dim=0).abs().max() < 1e-6
                covariance = z.T @ z / samples
                if samples > z.shape[1]:
                    torch.testing.assert_close(covariance, torch.eye(z.shape[1]).double(), atol=2e-6, rtol=0)
                else:
                    torch.testing.assert_close(covariance.diagonal(), torch.ones(z.shape[1]).double())
                    assert samples == 2 or (covariance - torch.eye(z.shape[1])).abs().max() > 0.05


def test_moments_change_the_independent_draws_as_little_as_possible() -> None:
    raw = together("independent", 400, layers={"a": 4})
    matched = together("moments", 400, layers={"a": 4})
    assert (matched - raw).abs().max() < 0.5 and (matched - raw).std() < 0.1
    # the polar factor is the nearest of all: turning it moves it away
    turned = matched @ torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()).Q
    assert (turned - raw).norm() > (matched - raw).norm()


@pytest.mark.parametrize("kind", ["independent", "antithetic", "sobol"])
def test_every_particle_is_standard_normal_on_its_own(kind: str) -> None:
    layers = {"a": 3, "b": 2}
    draws = torch.stack([together(kind, 4, seed, layers) for seed in range(1500)])  # (seeds, 4, 5)
    for particle in range(4):
        for column in range(5):
            assert stats.kstest(draws[:, particle, column].numpy(), "norm").pvalue > 1e-4
    # and its numbers do not depend on each other
    for particle in range(4):
        correlation = draws[:, particle].T.corrcoef() - torch.eye(5)
        assert correlation.abs().max() < 5 / 1500**0.5


@pytest.mark.parametrize(("samples", "r"), [(4, 2), (12, 3), (4, 5)])
def test_moment_matched_draws_have_their_known_law(samples: int, r: int) -> None:
    """A number is sqrt(N - 1) times a coordinate of a random unit vector in N - 1 dimensions: normal as N grows."""
    draws = torch.stack([together("moments", samples, seed, {"a": r}) for seed in range(1500)])
    for particle in (0, samples - 1):
        squares = draws[:, particle, 0].square() / (samples - 1)
        assert stats.kstest(squares.numpy(), stats.beta(0.5, (samples - 2) / 2).cdf).pvalue > 1e-4
        assert stats.binomtest(int((draws[:, particle, 0] > 0).sum()), 1500).pvalue > 1e-4
    many = together("moments", 2000, layers={"a": 2})
    assert stats.kstest(many[:, 0].numpy(), "norm").pvalue > 1e-3


def integral_error(kind: str, samples: int, seeds: int = 200) -> float:
    """Root mean square error of the average of a smooth function of 13 numbers, whose expectation is known."""
    weights = torch.linspace(-0.2, 0.25, 13).double()
    known = torch.exp(weights.square().sum() / 2)  # E exp(w z)
    averages = torch.stack([(together(kind, samples, seed) @ weights).exp().mean() for seed in range(seeds)])
    return float((averages - known).square().mean().sqrt())


def test_every_kind_integrates_a_smooth_function_better_than_independent_draws() -> None:
    independent = integral_error("independent", 16)
    size = float(torch.linspace(-0.2, 0.25, 13).square().sum())  # the variance of w z, which one draw's spread follows
    assert independent == pytest.approx((math.exp(size) * (math.exp(size) - 1) / 16) ** 0.5, rel=0.2)
    assert integral_error("sobol", 16) < 0.6 * independent
    assert integral_error("antithetic", 16) < 0.6 * independent
    assert integral_error("moments", 16) < 0.6 * independent


def test_averages_are_unbiased() -> None:
    weights = torch.linspace(-0.2, 0.25, 13).double()
    known = torch.exp(weights.square().sum() / 2)
    for kind in ("antithetic", "sobol"):
        averages = torch.stack([(together(kind, 4, seed) @ weights).exp().mean() for seed in range(2000)])
        assert abs(averages.mean() - known) < 4 * averages.std() / 2000**0.5


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="choose one of independent"):
        noise("latin", 4, LAYERS, 0)
    with pytest.raises(UserError, match="at least 1"):
        noise("sobol", 0, LAYERS, 0)
    with pytest.raises(UserError, match="at least 2"):
        noise("moments", 1, LAYERS, 0)
    with pytest.raises(UserError, match="21,201 dimensions"):
        noise("sobol", 2, {"a": 20_000, "b": 1_202}, 0)
