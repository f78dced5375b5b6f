"""Adaptive N in a model: its particles are the first ones, its averages are over those alone."""

import pytest
import torch
from tiny_base import adapted, loaded, questions
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.methods.temperature import TemperedPredictive
from scalabl.metrics.uncertainty import (
    apply_temperature,
    average,
    decompose,
    fit_temperature,
    mean_particles,
    negative_log_likelihood,
    particles_used,
)
from scalabl.predictive import MeanPredictive, MonteCarloPredictive, predict
from scalabl.predictive.adaptive import AdaptivePredictive, with_sampling
from scalabl.predictive.lora_particles import DropoutPredictive
from scalabl.predictive.sampling import Sampling
from scalabl.scoring import Batch, Continuation, Encoded, Scorer
from scalabl.scoring.trunk import Trunk

N = 14


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    model = adapted(last=2)
    return Scorer(model, Continuation(loaded()[1]), Trunk(model))


@pytest.fixture(scope="module")
def encoded(scorer: Scorer) -> list[Encoded]:
    return [scorer.scoring.encode(row) for row in questions(12)]


@pytest.fixture(scope="module")
def full(scorer: Scorer, encoded: list[Encoded]) -> Tensor:
    return predict(scorer, encoded, MonteCarloPredictive(N))


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5)


@pytest.fixture(scope="module")
def found(scorer: Scorer, encoded: list[Encoded]) -> Tensor:
    """(N, 12, 5) log class probabilities of some rows that stopped early and some that did not."""
    return predict(scorer, encoded, AdaptivePredictive(MonteCarloPredictive(N), 0.8))


def test_with_full_confidence_it_is_plain_monte_carlo(scorer: Scorer, encoded: list[Encoded], full: Tensor) -> None:
    for block in (2, 4, 14, 50):
        all_of_them = predict(scorer, encoded, AdaptivePredictive(MonteCarloPredictive(N), 1.0, block=block))
        close(all_of_them, full)
        assert (particles_used(all_of_them) == N).all() and mean_particles(all_of_them) == N


def test_a_row_has_the_first_particles_and_no_others(found: Tensor, full: Tensor) -> None:
    used = particles_used(found)
    assert found.shape == full.shape
    assert set(used.tolist()) <= {4, 8, 12, 14} and used.min() < N and len(set(used.tolist())) > 1
    assert mean_particles(found) == pytest.approx(used.double().mean().item())
    for row, n in enumerate(used.tolist()):
        close(found[:n, row], full[:n, row])
        assert (found[n:, row] == -torch.inf).all()
    assert torch.equal(average(found).argmax(-1), average(full).argmax(-1))


def test_averages_and_uncertainties_are_those_of_the_particles_a_row_has(found: Tensor) -> None:
    probs, parts = average(found), decompose(found)
    for row, n in enumerate(particles_used(found).tolist()):
        own = found[:n, row : row + 1]
        close(probs[row], own[:, 0].double().exp().mean(dim=0), 1e-7)
        alone = decompose(own)
        pairs = [(probs[row], average(own)[0])]
        pairs += [(getattr(parts, name)[row], getattr(alone, name)[0]) for name in ("total", "aleatoric", "epistemic")]
        for together, apart in pairs:
            torch.testing.assert_close(together, apart, atol=1e-13, rtol=1e-12)


def test_a_temperature_counts_the_same_particles(scorer: Scorer, encoded: list[Encoded], found: Tensor) -> None:
    labels = torch.tensor([row.answer for row in encoded])
    cooled = apply_temperature(found, 1.7)
    assert torch.equal(particles_used(cooled), particles_used(found))
    probs = average(cooled)
    nll = -probs[torch.arange(12), labels].log().mean().item()
    assert negative_log_likelihood(cooled, labels).item() == pytest.approx(nll, abs=1e-6)
    fitted = fit_temperature(found, labels)
    best = [negative_log_likelihood(apply_temperature(found, fitted * factor), labels) for factor in (0.97, 1, 1.03)]
    assert best[1] <= min(best[0], best[2])
    inner = AdaptivePredictive(MonteCarloPredictive(N), 0.8)
    close(
        predict(scorer, encoded, TemperedPredictive(inner, 1.7)),
        apply_temperature(predict(scorer, encoded, inner), 1.7),
    )


def test_batch_size_order_and_chunk_change_nothing(scorer: Scorer, encoded: list[Encoded]) -> None:
    def run(rows: list[Encoded], size: int, chunk: int | None = None) -> Tensor:
        predictive = AdaptivePredictive(MonteCarloPredictive(N, chunk=chunk), 0.8)
        return predict(scorer, rows, predictive, batch_size=size)

    whole = run(encoded, 12)
    for size, chunk in ((1, None), (5, 3), (8, 1)):
        close(run(encoded, size, chunk), whole)
    close(run(encoded[::-1], 4)[:, range(11, -1, -1)], whole)


def test_settled_rows_are_not_run_again(
    scorer: Scorer, encoded: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, passes = MonteCarloPredictive.draw, []

    def counted(self: MonteCarloPredictive, scorer: Scorer, batch: Batch, first: int, samples: int) -> Tensor:
        passes.append(len(batch) * samples)
        return draw(self, scorer, batch, first, samples)

    monkeypatch.setattr(MonteCarloPredictive, "draw", counted)
    taken = particles_used(predict(scorer, encoded, AdaptivePredictive(MonteCarloPredictive(N), 0.8), batch_size=5))
    assert sum(passes) == taken.sum() < N * len(encoded)


def test_a_threshold_changes_what_is_to_be_decided(scorer: Scorer, encoded: list[Encoded], full: Tensor) -> None:
    confidence = average(full).max(dim=-1).values
    used = {}
    for threshold in (None, 0.01, 0.999, float(confidence.median())):
        predictive = AdaptivePredictive(MonteCarloPredictive(N), 0.8, threshold=threshold)
        log_probs = predict(scorer, encoded, predictive)
        used[threshold] = particles_used(log_probs)
        if threshold is not None:
            assert torch.equal(average(log_probs).max(dim=-1).values < threshold, confidence < threshold)
    # all rows abstain at 0.999: whichever choice is best need not be known
    assert used[0.999].sum() < used[None].sum()
    nearest = (confidence - confidence.median()).abs().argmin()
    assert used[float(confidence.median())][nearest] == N


def test_any_predictive_of_independent_particles_can_be_adaptive(scorer: Scorer, encoded: list[Encoded]) -> None:
    dropout = DropoutPredictive(0.3, samples=N)
    log_probs = predict(scorer, encoded, with_sampling(dropout, Sampling(confidence=0.8)))
    all_of_them = predict(scorer, encoded, dropout)
    for row, n in enumerate(particles_used(log_probs).tolist()):
        close(log_probs[:n, row], all_of_them[:n, row])
    assert mean_particles(log_probs) < N


def test_fewer_samples_than_a_block_are_plain_monte_carlo(scorer: Scorer, encoded: list[Encoded], full: Tensor) -> None:
    close(predict(scorer, encoded, AdaptivePredictive(MonteCarloPredictive(3), 0.5)), full[:3])


def test_bad_settings_are_refused() -> None:
    mc = MonteCarloPredictive(8)
    for confidence in (0.0, 1.1, -1.0, float("nan")):
        with pytest.raises(UserError, match="confidence"):
            AdaptivePredictive(mc, confidence)
    with pytest.raises(UserError, match="block"):
        AdaptivePredictive(mc, block=1)
    with pytest.raises(UserError, match="threshold"):
        AdaptivePredictive(mc, threshold=1.5)
    with pytest.raises(UserError, match="independent draws"):
        AdaptivePredictive(MonteCarloPredictive(8, draws="sobol"))
    with pytest.raises(UserError, match="independent draws"):
        Sampling(draws="moments", confidence=0.9)
    with pytest.raises(UserError, match="average over particles"):
        with_sampling(MeanPredictive(), Sampling(confidence=0.9))
    assert with_sampling(mc, Sampling()) is mc
