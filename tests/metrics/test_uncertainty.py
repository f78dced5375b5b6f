"""Uncertainty: the closed forms, the identities that hold for every input, and the edges."""

import math

import pytest
import torch

from scalabl.core.errors import UserError
from scalabl.metrics.uncertainty import average, decompose, mean_particles, particles_used


def particles(num: int, rows: int, choices: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(num, rows, choices, generator=generator)).log_softmax(dim=-1)


def test_average_is_the_mean_of_the_probabilities() -> None:
    log_probs = particles(7, 20, 4)
    torch.testing.assert_close(average(log_probs), log_probs.double().exp().mean(dim=0))


def test_average_survives_probabilities_that_underflow_in_float32() -> None:
    log_probs = torch.tensor([[[-200.0, 0.0]], [[-300.0, 0.0]]])
    assert average(log_probs)[0, 0].log().item() == pytest.approx(-200 - math.log(2))


def test_particles_that_agree_leave_no_epistemic_part() -> None:
    log_probs = particles(1, 30, 5).expand(9, -1, -1)
    parts = decompose(log_probs)
    assert parts.epistemic.max() < 1e-14
    torch.testing.assert_close(parts.total, torch.distributions.Categorical(logits=log_probs[0].double()).entropy())


def test_certain_particles_that_disagree_are_epistemic_alone() -> None:
    certain = torch.full((2, 1, 2), -torch.inf)
    certain[0, 0, 0] = certain[1, 0, 1] = 0
    parts = decompose(certain)
    assert parts.total.item() == pytest.approx(math.log(2))
    assert parts.aleatoric.item() == 0
    assert parts.epistemic.item() == pytest.approx(math.log(2))


def test_epistemic_part_is_the_mean_divergence_from_the_average() -> None:
    log_probs = particles(6, 40, 4).double()
    expected = (log_probs.exp() * (log_probs - average(log_probs).log())).sum(dim=-1).mean(dim=0)
    torch.testing.assert_close(decompose(log_probs).epistemic, expected)


def test_one_particle_has_exactly_no_epistemic_part() -> None:
    assert torch.equal(decompose(particles(1, 500, 5)).epistemic, torch.zeros(500, dtype=torch.float64))


def test_parts_add_up_and_are_never_negative() -> None:
    for scale in (1e-6, 1.0, 50.0):
        parts = decompose(particles(10, 300, 4, scale))
        assert (parts.epistemic >= 0).all() and (parts.aleatoric >= 0).all()
        torch.testing.assert_close(parts.total, parts.aleatoric + parts.epistemic, rtol=0, atol=1e-15)
        assert (parts.total <= math.log(4) + 1e-12).all()


def test_missing_choices_change_nothing() -> None:
    log_probs = particles(5, 20, 3)
    padded = torch.cat([log_probs, torch.full((5, 20, 2), -torch.inf)], dim=-1)
    before, after = decompose(log_probs), decompose(padded)
    torch.testing.assert_close(after.total, before.total)
    torch.testing.assert_close(after.epistemic, before.epistemic)
    assert torch.equal(average(padded)[:, 3:], torch.zeros(20, 2, dtype=torch.float64))


def test_particles_that_a_row_has_not_drawn_count_for_nothing() -> None:
    log_probs = particles(8, 20, 4)
    used = torch.arange(20) % 8 + 1
    ragged = log_probs.masked_fill(torch.arange(8)[:, None, None] >= used[:, None], -torch.inf)
    assert torch.equal(particles_used(ragged), used) and torch.equal(particles_used(log_probs), torch.full((20,), 8))
    assert mean_particles(ragged) == used.double().mean().item() and mean_particles(log_probs) == 8
    parts = decompose(ragged)
    for row, n in enumerate(used.tolist()):
        own = log_probs[:n, row : row + 1]
        torch.testing.assert_close(average(ragged)[row], average(own)[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(parts.aleatoric[row], decompose(own).aleatoric[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(parts.epistemic[row], decompose(own).epistemic[0], rtol=1e-12, atol=1e-14)
    ragged[:, 3] = -torch.inf
    with pytest.raises(UserError, match="row 3, particle 0 sum to 0"):
        average(ragged)


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        (torch.zeros(3, 2), "shape"),
        (torch.zeros(0, 3, 2), "at least one particle"),
        (torch.full((1, 2, 2), math.nan), "row 0 hold NaN"),
        (torch.zeros(1, 2, 2), "sum to 2"),
        (torch.full((1, 2, 2), -torch.inf), "sum to 0"),
    ],
)
def test_refuses_what_is_no_distribution(log_probs: torch.Tensor, message: str) -> None:
    for function in (average, decompose):
        with pytest.raises(UserError, match=message):
            function(log_probs)
