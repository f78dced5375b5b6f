"""The weight of the KL as a function of the step."""

import math

import pytest

from scalabl.training.kl import SCHEDULES, kl_weight, minibatch_share, warmup_share


def test_elbo_is_one_over_n_at_every_step() -> None:
    values = {kl_weight("elbo", step, num_examples=50, total_steps=20, cycle=5) for step in range(20)}
    assert values == {1 / 50}


def test_warmup_rises_linearly_and_stays() -> None:
    shares = [warmup_share(step, 100, 0.2) for step in range(100)]
    assert shares[0] == 0
    assert shares[:20] == pytest.approx([step / 20 for step in range(20)])
    assert set(shares[20:]) == {1.0}
    assert warmup_share(0, 100, 0.0) == 1


@pytest.mark.parametrize("cycle", [1, 2, 7, 50])
def test_minibatch_is_the_papers_formula(cycle: int) -> None:
    paper = [2**i / (2**cycle - 1) for i in range(cycle)]
    assert [minibatch_share(step, cycle) / cycle for step in range(cycle)] == pytest.approx(paper, rel=1e-12)


@pytest.mark.parametrize("cycle", [1, 3, 60, 1023, 1025, 5000, 100_000])
def test_minibatch_averages_to_one_over_any_cycle(cycle: int) -> None:
    shares = [minibatch_share(step, cycle) for step in range(cycle)]
    assert all(math.isfinite(share) for share in shares)
    assert sum(shares) / cycle == pytest.approx(1, rel=1e-12)
    assert shares == sorted(shares)
    assert minibatch_share(cycle + 1 % cycle, cycle) == shares[1 % cycle]  # it starts again


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_beta_multiplies_and_n_divides(schedule: str) -> None:
    for step in (0, 3, 9):
        options = {"total_steps": 10, "cycle": 4, "warmup_fraction": 0.5}
        one = kl_weight(schedule, step, num_examples=1, **options)  # type: ignore[arg-type]
        other = kl_weight(schedule, step, num_examples=40, beta=0.25, **options)  # type: ignore[arg-type]
        assert other == pytest.approx(one / 160, rel=1e-12)
