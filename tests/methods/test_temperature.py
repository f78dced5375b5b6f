"""Temperature scaling against logits whose temperature is known."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.inference.settings import temperature_in
from scalabl.metrics.uncertainty import apply_temperature, fit_temperature, negative_log_likelihood


def simulated(true: float, *, particles: int = 1, rows: int = 20_000, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, n, C) that are sharper than the labels they come with by a factor of `true`."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return (true * logits).log_softmax(-1).expand(particles, -1, -1), labels


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5, 8.0])
@pytest.mark.parametrize("particles", [1, 3])
def test_a_known_temperature_is_found(true: float, particles: int) -> None:
    log_probs, labels = simulated(true, particles=particles)
    # the estimate's standard error at 20,000 rows is below 2 %
    assert fit_temperature(log_probs, labels) == pytest.approx(true, rel=0.06)


def test_it_is_the_minimum_of_the_likelihood_of_the_average() -> None:
    log_probs, labels = simulated(3.0, rows=500)
    log_probs = (log_probs + 0.7 * torch.randn(4, 500, 4, generator=torch.Generator().manual_seed(1))).log_softmax(-1)
    temperature = fit_temperature(log_probs, labels)
    nll = {
        t: negative_log_likelihood(apply_temperature(log_probs.double(), t), labels).item()
        for t in (temperature, 0.98 * temperature, 1.02 * temperature, 1.0)
    }
    assert min(nll, key=nll.__getitem__) == temperature and nll[temperature] < nll[1.0] - 0.01


def test_no_particle_changes_its_answer() -> None:
    log_probs, _ = simulated(3.0, particles=2, rows=300)
    for temperature in (0.05, 0.7, 1.0, 40.0):
        tempered = apply_temperature(log_probs, temperature)
        assert torch.equal(tempered.argmax(-1), log_probs.argmax(-1))
        torch.testing.assert_close(tempered.exp().sum(-1), torch.ones(2, 300))
    torch.testing.assert_close(apply_temperature(log_probs, 1.0), log_probs)


def test_missing_choices_stay_missing_and_do_not_count() -> None:
    log_probs, labels = simulated(2.0, rows=2_000)
    missing = torch.full((1, 2_000, 2), -torch.inf)
    wider = torch.cat([log_probs, missing], dim=-1)
    assert fit_temperature(wider, labels) == pytest.approx(fit_temperature(log_probs, labels), rel=1e-4)
    tempered = apply_temperature(wider, 3.0)
    torch.testing.assert_close(tempered[..., :4], apply_temperature(log_probs, 3.0))
    assert (tempered[..., 4:] == -torch.inf).all()


def test_rows_that_are_all_right_or_all_wrong_end_at_a_finite_limit() -> None:
    log_probs, _ = simulated(1.0, rows=50)
    right, wrong = log_probs[0].argmax(-1), log_probs[0].argmin(-1)
    assert 0 < fit_temperature(log_probs, right) < 0.2
    assert 5 < fit_temperature(log_probs, wrong) < 1e3


def test_impossible_input_is_refused() -> None:
    log_probs, labels = simulated(1.0, rows=5)
    with pytest.raises(UserError, match="validation split"):
        fit_temperature(log_probs[:, :0], labels[:0])
    with pytest.raises(UserError, match="not finite"):
        fit_temperature(log_probs * torch.nan, labels)


@pytest.mark.parametrize("value", ["x", None, True, float("nan"), float("inf"), 0, -1, [1.0]])
def test_a_file_with_another_value_is_refused(value: object) -> None:
    path = Path("temperature.json")
    with pytest.raises(UserError, match="temperature is .*; it must be a number above 0; fit it again"):
        temperature_in({"temperature": value}, path)
    assert temperature_in({"temperature": 2}, path) == 2.0
