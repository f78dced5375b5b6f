"""Seeded draws by particle number."""

import pytest
import torch
from scipy import stats

from scalabl.posterior import standard_normal
from scalabl.posterior.draws import uniform


def draw(particles: range | list[int], size: int = 8, seed: int = 0, stream: str = "q_proj") -> torch.Tensor:
    return standard_normal(particles, size, seed=seed, stream=stream)


def test_a_particle_alone_is_the_particle_among_others() -> None:
    ten = draw(range(10))
    assert ten.shape == (10, 8) and ten.dtype == torch.float32
    assert torch.equal(draw([7])[0], ten[7])
    assert torch.equal(draw([3, 9, 3]), ten[[3, 9, 3]])
    assert torch.equal(draw(range(4, 8)), ten[4:8])


def test_a_larger_rank_extends_a_smaller_one() -> None:
    assert torch.equal(draw([5], size=12)[:, :8], draw([5], size=8))


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = draw([0])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draw([0]), first)


def test_golden_values() -> None:
    """The same numbers on every machine and in every release: saved particles depend on them."""
    layer = "model.layers.0.self_attn.q_proj"
    assert uniform([0, 1, 1_000_000_007], 3, seed=0, stream=layer).tolist() == [
        [0.6322477755868818, 0.9172392473880395, 0.9218829077610766],
        [0.741921665346408, 0.25392976914177096, 0.24694577762218478],
        [0.6284247306329152, 0.3755360723843902, 0.04421717241570883],
    ]
    # the normal quantile's last bit may differ between machines
    assert standard_normal([0, 1], 3, seed=42, stream=layer).flatten().tolist() == pytest.approx(
        [
            1.583389401435852,
            -0.914834201335907,
            0.3679698705673218,
            1.419873833656311,
            0.7716493010520935,
            -0.6312624216079712,
        ],
        abs=1e-6,
    )


def test_seeds_streams_and_particles_are_independent() -> None:
    n = 20_000
    samples = torch.stack(
        [
            draw(range(n), size=1, seed=0, stream="a").flatten(),
            draw(range(n), size=1, seed=0, stream="b").flatten(),
            draw(range(n), size=1, seed=1, stream="a").flatten(),
            draw(range(1, n + 1), size=1, seed=0, stream="a").flatten(),
            draw(range(n), size=2, seed=0, stream="a")[:, 1],
        ]
    )
    correlation = samples.corrcoef() - torch.eye(len(samples))
    assert correlation.abs().max() < 5 / n**0.5
    # and of the squares, so that the sizes are independent too
    assert (samples.square().corrcoef() - torch.eye(len(samples))).abs().max() < 5 / n**0.5


def test_particles_share_no_numbers_however_large_the_rank() -> None:
    assert len(torch.unique(uniform(range(50), 256, seed=0, stream="a"))) == 50 * 256


@pytest.mark.parametrize("stream", ["model.layers.0.self_attn.q_proj", "lm_head"])
def test_draws_are_standard_normal(stream: str) -> None:
    sample = draw(range(20_000), size=2, stream=stream).flatten().double().numpy()
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert abs(sample.mean()) < 5 / len(sample) ** 0.5
    assert abs(sample.var() - 1) < 5 * (2 / len(sample)) ** 0.5


def test_uniform_numbers_never_touch_their_ends() -> None:
    numbers = uniform(range(1000), 8, seed=3, stream="x")
    assert numbers.min() > 0 and numbers.max() < 1
    assert draw(range(1000)).isfinite().all()
