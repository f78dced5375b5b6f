"""The evidence and the posterior from a curvature that is known."""

from pathlib import Path

import pytest
import torch
from plain_lora import bayesian, letters, plain_adapter
from tiny_base import adapted, questions

from scalabl.core.errors import UserError
from scalabl.posterior.evidence import best_precision, log_evidence
from scalabl.training.posthoc.laplace import JointCurvature, fit_laplace, posterior_of, used_components
from scalabl.training.posthoc.svd import StochasticLeaves, factors_of


def derivative(log_precision: float, norm: float, values: torch.Tensor) -> float:
    """Of the evidence in the logarithm of the precision."""
    x = torch.tensor(log_precision, dtype=torch.float64, requires_grad=True)
    log_evidence(0.0, norm, [values], x.exp()).backward()
    assert x.grad is not None
    return x.grad.item()


@pytest.mark.parametrize("values", [[0.3, 8.0, 100.0, 0.0], [1e-4] * 6, [1e5, 1e5], [30.0, 1e-6, 1e-6, 2.0]])
def test_at_the_best_precision_the_evidences_derivative_vanishes(values: list[float]) -> None:
    h = torch.tensor(values, dtype=torch.float64)
    found = best_precision(len(values), [h])
    x = torch.tensor(found, dtype=torch.float64).log().item()
    assert abs(derivative(x, len(values), h)) < 1e-6 * len(values)
    assert derivative(x - 0.3, len(values), h) > 0 > derivative(x + 0.3, len(values), h)
    # MacKay's fixed point: precision |s|^2 is the effective number of parameters, so that the precision is at most 1
    assert found * len(values) == pytest.approx((h / (h + found)).sum().item(), rel=1e-5)
    assert found <= 1


def test_equal_eigenvalues_have_a_precision_in_closed_form() -> None:
    h, norm, number = 3.0, 2.5, 12
    expected = (-h * norm + ((h * norm) ** 2 + 4 * norm * number * h) ** 0.5) / (2 * norm)
    assert best_precision(norm, [torch.full((number,), h, dtype=torch.float64)]) == pytest.approx(expected, rel=1e-6)


def test_eigenvalues_far_apart_have_the_maximum_of_a_grid() -> None:
    h = torch.cat([torch.full((4,), 1e7), torch.full((200,), 1e-3)]).double()
    norm = 40.0
    grid = torch.linspace(-18, 9, 2701, dtype=torch.float64).tolist()
    best = max(grid, key=lambda x: log_evidence(0.0, norm, [h], torch.tensor(x, dtype=torch.float64).exp()).item())
    assert torch.tensor(best_precision(norm, [h])).log().item() == pytest.approx(best, abs=0.02)


def test_the_posterior_of_a_linear_gaussian_model_is_the_closed_form() -> None:
    """y = X s + noise of variance 1: H = X^T X is exact, and the posterior is that of Bayesian linear regression."""
    design = torch.randn(30, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curvature = JointCurvature(design.T @ design, {"a": 3, "b": 4}, -1.0, 30)
    joint, facts = posterior_of(curvature, 7, 0.4)
    expected = torch.linalg.inv(design.T @ design + 0.4 * torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(joint.covariance(), expected, rtol=1e-5, atol=1e-8)
    assert facts["prior_precision"] == 0.4 and facts["numbers"] == 7
    free, chosen = posterior_of(curvature, 7)
    assert chosen["log_evidence"] > facts["log_evidence"] and free.size == 7
    with pytest.raises(UserError, match="must be a positive number"):
        posterior_of(curvature, 7, 0.0)


def test_directions_without_data_keep_the_prior_however_large_the_curvature_is_elsewhere() -> None:
    vector = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    joint, _ = posterior_of(JointCurvature(1e9 * torch.outer(vector, vector), {"a": 3}, 0.0, 1), 3, 0.25)
    across = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64) / 5**0.5
    assert across @ joint.covariance() @ across == pytest.approx(4.0, rel=1e-4)
    assert vector @ joint.covariance() @ vector < 1e-5


def test_unused_components_neither_count_nor_reach_a_prediction(tmp_path: Path) -> None:
    """Where B has 3 of 4 columns zero, one component a layer is left, and its relative noise is all there is."""
    model, leaves = bayesian(plain_adapter(tmp_path, zero_columns=3))
    scorer, batch = letters(model)
    rows = [scorer.scoring.encode(row) for row in questions(9)]
    with leaves.in_place(model):
        assert used_components(scorer) == 6
        joint, facts = fit_laplace(scorer, rows)
    assert (facts["components"], facts["numbers"]) == (6, 24)
    assert facts["effective_parameters"] <= 6 and facts["prior_precision"] <= 1
    first = torch.tensor([i % 4 == 0 for i in range(24)])
    unused = joint.covariance()[~first][:, ~first]
    torch.testing.assert_close(
        unused, torch.eye(18, dtype=torch.float64) / facts["prior_precision"], rtol=1e-4, atol=1e-4
    )


def test_the_adapters_scale_does_not_change_the_relative_posterior(tmp_path: Path) -> None:
    """B / c and alpha c are the same adapter, and so is its posterior: with s = sv they would differ."""
    found = []
    for number, (alpha, factor) in enumerate(((8, 1.0), (80, 0.1))):
        model, _ = bayesian(plain_adapter(tmp_path / str(number), lora_alpha=alpha))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(factor)
        leaves = StochasticLeaves(factors_of(model))
        scorer, _ = letters(model)
        with leaves.in_place(model):
            found.append(fit_laplace(scorer, [scorer.scoring.encode(row) for row in questions(9)]))
    assert found[0][1]["prior_precision"] == pytest.approx(found[1][1]["prior_precision"], rel=1e-3)
    scale = found[0][0].covariance().abs().max().item()
    torch.testing.assert_close(found[0][0].marginals, found[1][0].marginals, rtol=1e-2, atol=1e-2 * scale**0.5)


def test_adapters_without_effect_or_with_another_mean_are_refused(tmp_path: Path) -> None:
    model, _ = bayesian(plain_adapter(tmp_path, zero_columns=4))
    scorer, _ = letters(model)
    with StochasticLeaves(factors_of(model)).in_place(model), pytest.raises(UserError, match="never trained"):
        used_components(scorer)
    trained, _ = letters(adapted(covariance="full"))
    with pytest.raises(UserError, match="s must be 1"):
        used_components(trained)
