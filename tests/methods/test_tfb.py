"""TFB against its own claims: isotropic noise in the column space of B, and the largest scale that still passes."""

import pytest
import torch
from torch import Tensor

from scalabl.data import Example
from scalabl.methods import tfb
from scalabl.methods.tfb import largest_passing, noise_mixers
from scalabl.metrics.uncertainty import negative_log_likelihood
from scalabl.posterior import standard_normal
from scalabl.predictive import MeanPredictive, predict
from scalabl.predictive.lora_particles import lora_parts
from scalabl.runs.method import Run, load_post_hoc

D_OUT, R, D_IN = 7, 3, 5


def up(seed: int = 0) -> Tensor:
    """B with singular values far apart."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(D_OUT, R, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(R, R, generator=generator))
    return u @ torch.diag(torch.tensor([3.0, 0.5, 0.01])) @ v.T


def test_the_noise_on_ba_is_isotropic_in_the_column_space_of_b() -> None:
    """Cov(B noise x) = sigma^2 |x|^2 U U^T: the projector onto B's columns, whatever the singular values are."""
    b = up()
    mixer = noise_mixers({"b": b})["b"]
    u, d, vt = torch.linalg.svd(b, full_matrices=False)
    torch.testing.assert_close((b @ mixer) @ (b @ mixer).T, u @ u.T, atol=1e-4, rtol=1e-4)
    # in the rotated adapter (U diag(d)) (V^T A), row i of the noise has standard deviation 1 / d_i
    torch.testing.assert_close((vt @ mixer) @ (vt @ mixer).T, torch.diag(d**-2), atol=1e-2, rtol=1e-3)


def test_it_is_so_for_drawn_noise_too() -> None:
    b, sigma, number = up(), 0.3, 20_000
    x = torch.randn(D_IN, generator=torch.Generator().manual_seed(1))
    normal = standard_normal(range(number), R * D_IN, seed=0, stream="x").view(number, R, D_IN)
    noise = tfb._noisy(noise_mixers({"b": b}), sigma, samples=1, seed=0).spread("b.lora_A", normal)
    outputs = noise @ x @ b.T
    u = torch.linalg.svd(b, full_matrices=False).U
    variance = sigma**2 * x.square().sum()
    torch.testing.assert_close(outputs.T @ outputs / number / variance, u @ u.T, atol=0.04, rtol=0)


def test_directions_that_b_does_not_use_get_no_noise() -> None:
    b = up()
    b = b - b @ torch.ones(R, R) / R  # one direction of rank r is lost
    noise = b @ noise_mixers({"b": b})["b"]
    assert torch.linalg.matrix_rank(b) == R - 1
    assert noise.isfinite().all() and torch.linalg.matrix_rank(noise, atol=1e-3) == R - 1
    assert not noise_mixers({"b": torch.zeros(D_OUT, R)})["b"].any()


@pytest.mark.parametrize("threshold", [0.0011, 0.02, 0.11, 0.19, 0.5])
def test_bisection_finds_the_largest_scale_that_passes(threshold: float) -> None:
    tried: list[float] = []

    def passes(sigma: float) -> bool:
        tried.append(sigma)
        return sigma <= threshold

    found = largest_passing(passes, 0.001, 0.2, 5)
    assert len(tried) == len(set(tried)) <= 6 and found in tried
    assert found <= threshold and found == max(t for t in tried if t <= threshold)
    assert min(threshold, 0.2) - found <= (0.2 - 0.001) / 2**5 + 1e-12


def test_where_nothing_passes_the_lowest_scale_is_left() -> None:
    tried: list[float] = []
    assert largest_passing(lambda sigma: bool(tried.append(sigma)), 0.001, 0.2, 5) == 0.001
    assert tried[-1] == 0.001 and tried[:5] == sorted(tried[:5], reverse=True)


def test_the_fitted_scale_keeps_the_nll_within_the_tolerance(mle: Run, train_rows: list[Example]) -> None:
    facts = load_post_hoc("tfb").fit(mle, train_rows, [], seed=3)
    labels = torch.tensor([row.answer for row in train_rows])
    encoded = mle.encode(train_rows)

    def nll(strategy: object) -> float:
        return negative_log_likelihood(predict(mle.scorer, encoded, strategy), labels).item()  # type: ignore[arg-type]

    without = nll(MeanPredictive())
    assert facts["nll_without"] == pytest.approx(without, rel=1e-5)
    within = {t["sigma"]: abs(t["nll"] / without - 1) <= 0.003 for t in facts["nll_tried"]}
    assert facts["within_tolerance"] and within[facts["sigma"]]
    # what was refused is larger, and nothing larger passed
    assert all(sigma > facts["sigma"] for sigma, ok in within.items() if not ok)
    assert all(sigma <= facts["sigma"] for sigma, ok in within.items() if ok)
    again = nll(load_post_hoc("tfb").predictive(mle, samples=10, seed=3))
    assert again == pytest.approx(next(t["nll"] for t in facts["nll_tried"] if t["sigma"] == facts["sigma"]), rel=1e-5)
    assert set(load_post_hoc("tfb").tensors(mle)) == set(lora_parts(mle.scorer.model))


def test_a_wider_tolerance_lets_more_noise_pass(
    mle: Run, train_rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = []
    for tolerance in (1e-5, 0.003, 10.0):
        monkeypatch.setattr(tfb, "TOLERANCE", tolerance)
        scales.append(load_post_hoc("tfb").fit(mle, train_rows, [])["sigma"])
    assert scales == sorted(scales) and scales[0] < scales[-1] == pytest.approx(0.2, abs=0.007)
