"""tau and T are the joint minimum of the held-out rows' NLL, unless the rows are too few to tell."""

import math

import pytest
import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics.calibration import ROWS_NEEDED, bounded_temperature, fit_calibration, row_losses
from scalabl.metrics.uncertainty import apply_temperature, average


class World:
    """Rows whose logits are Gaussian around a mean; labels are drawn from the average at a true tau and T."""

    def __init__(self, rows: int, *, scale: float, temperature: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mean = 2.5 * torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        spread = torch.rand(rows, 1, generator=generator, dtype=torch.float64).square() * 4
        self.noise = spread * torch.randn(10, rows, 4, generator=generator, dtype=torch.float64)
        self.asked: list[float] = []
        truth = average(apply_temperature(self(scale), temperature))
        self.labels = torch.multinomial(truth, 1, generator=generator).squeeze(1)
        self.asked.clear()

    def __call__(self, scale: float) -> Tensor:
        self.asked.append(scale)
        return (self.mean + scale * self.noise).log_softmax(dim=-1)

    def nll(self, scale: float, temperature: float) -> float:
        return float(row_losses(self(scale), self.labels, temperature).mean())


@pytest.mark.parametrize(("scale", "temperature"), [(2.0, 0.7), (0.5, 1.5), (4.0, 1.0)])
def test_it_finds_what_a_search_of_everything_finds(scale: float, temperature: float) -> None:
    world = World(1000, scale=scale, temperature=temperature)
    fit = fit_calibration(world, world.labels)
    assert len(set(world.asked)) == len(fit.tried) <= 10  # a pass each
    assert fit.before == pytest.approx(world.nll(1.0, 1.0)) and fit.after == pytest.approx(
        world.nll(fit.scale, fit.temperature)
    )
    searched = []
    for tau in (2 ** (i / 3) for i in range(-6, 9)):
        log_probs = world(tau)
        for i in range(-8, 9):
            searched.append((float(row_losses(log_probs, world.labels, 2 ** (i / 8)).mean()), tau))
    best, tau = min(searched)
    assert fit.after < best + 2e-3 and abs(math.log2(fit.scale / tau)) <= 0.5
    assert abs(math.log2(fit.scale / scale)) <= 0.6 and fit.after < fit.before - 0.01


def test_one_wrong_row_makes_no_votes_of_the_particles() -> None:
    """Of 50 rows one is wrong, which some particles of a wide posterior get right: their hardened votes would be 0.018
    nats better on these rows, and every probability a multiple of 1 / N."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(50) % 12
    logits = 8.0 * torch.nn.functional.one_hot(labels, 12)
    logits[0] = torch.zeros(12).index_fill(0, (labels[0] + 1) % 12, 8.0).index_fill(0, labels[0], 5.0)
    noise = 0.25 * torch.randn(10, 50, 12, generator=generator)
    fit = fit_calibration(lambda scale: (logits + scale * noise).log_softmax(dim=-1), labels)
    votes = min(fit.tried, key=lambda scale: fit.tried[scale][1])
    assert fit.tried[votes][0] < 0.05 and fit.tried[votes][1] < fit.after - 0.015
    assert fit.scale < votes and fit.temperature > 0.5


def test_the_mean_is_a_candidate() -> None:
    world = World(1000, scale=0.0, temperature=1.0)
    fit = fit_calibration(world, world.labels)
    # a width that cannot be told from none is kept: its particles still disagree
    assert fit.scale < 0.2 and 0.0 in fit.tried and fit.temperature == pytest.approx(1.0, abs=0.1)
    world.noise *= 8  # now the smallest width that is tried is too wide
    fit = fit_calibration(world, world.labels)
    assert fit.scale == 0 and fit.temperature == pytest.approx(1.0, abs=0.1)


def test_on_few_rows_the_posterior_is_left_as_it_was_learnt() -> None:
    moved = [fit_calibration(world, world.labels).scale != 1 for world in _worlds(ROWS_NEEDED)]
    assert sum(moved) <= 0.2 * len(moved)
    world = World(1000, scale=1.0, temperature=1.4)
    assert fit_calibration(world, world.labels).scale == 1.0


def _worlds(rows: int) -> list[World]:
    return [World(rows, scale=1.0, temperature=1.0, seed=seed) for seed in range(10)]


def test_a_gain_has_to_exceed_its_standard_error() -> None:
    for world in _worlds(60):
        fit = fit_calibration(world, world.labels)
        nll = {scale: row_losses(world(scale), world.labels, t) for scale, (t, _) in fit.tried.items()}
        best = min(nll.keys() - {0.0}, key=lambda scale: float(nll[scale].mean()))

        def wins(gain: Tensor) -> bool:
            return float(gain.mean()) > max(float(gain.std()) / 60**0.5, 1e-4)

        best = 0.0 if wins(nll[best] - nll[0.0]) else best
        assert fit.scale == (best if wins(nll[1.0] - nll[best]) else 1.0)
        assert fit.after <= fit.before + 1e-12


def test_without_a_posterior_it_is_the_temperature_alone() -> None:
    world = World(500, scale=1.0, temperature=2.0)
    fit = fit_calibration(world, world.labels, has_scale=False)
    assert world.asked == [1.0] and fit.scale == 1 and list(fit.tried) == [1.0]
    temperatures = [2 ** (i / 20) for i in range(-40, 41)]
    best = min(temperatures, key=lambda t: world.nll(1.0, t))
    assert fit.temperature == pytest.approx(best, rel=0.04)


def test_a_posterior_without_effect_stays_as_it_is() -> None:
    world = World(200, scale=1.0, temperature=1.0)
    world.noise *= 1e-9
    assert fit_calibration(world, world.labels).scale == 1.0


def test_rows_that_are_all_right_do_not_make_it_surer_without_end() -> None:
    logits = 1 + torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(0))
    logits[..., 0] += 2
    right = torch.zeros(40, dtype=torch.long)
    assert bounded_temperature(logits.log_softmax(-1), right) == 1.0
    one_wrong = right.clone()
    one_wrong[0] = 1
    assert 0.05 < bounded_temperature(logits.log_softmax(-1), one_wrong) < 1


def test_too_few_rows_are_refused_with_the_number_and_the_reason() -> None:
    world = World(ROWS_NEEDED - 1, scale=1.0, temperature=1.0)
    with pytest.raises(
        UserError, match=rf"{ROWS_NEEDED - 1} labelled rows are too few .* it takes {ROWS_NEEDED}: .*1 / \(2 n\)"
    ):
        fit_calibration(world, world.labels)
    assert world.asked == []
