"""Laplace-LoRA's evidence against conjugate closed forms, and its predictive against the Gaussian that it claims."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from test_laplace_curvature import LETTERS, dense, one_token, scorer
from torch import Tensor
from torch.distributions import MultivariateNormal

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.methods.laplace import LinearizedLaplacePredictive
from scalabl.metrics.uncertainty import average
from scalabl.posterior.evidence import best_precision, log_evidence
from scalabl.predictive import MeanPredictive, predict
from scalabl.predictive.kronecker import gauss_newton
from scalabl.predictive.lora_particles import lora_matrices
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run, load_post_hoc

laplace = load_post_hoc("laplace")


@pytest.mark.parametrize("precision", [0.1, 1.0, 30.0])
def test_the_evidence_of_a_linear_gaussian_model_is_exact(precision: float) -> None:
    """y = Phi theta + noise: at the posterior mode Laplace's evidence is log N(y; 0, Phi Phi^T / precision + I)."""
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    y = phi @ torch.randn(6, generator=generator, dtype=torch.float64) + torch.randn(
        20, generator=generator, dtype=torch.float64
    )
    curvature = phi.T @ phi
    mode = torch.linalg.solve(curvature + precision * torch.eye(6), phi.T @ y)
    log_likelihood = MultivariateNormal(phi @ mode, torch.eye(20, dtype=torch.float64)).log_prob(y)
    found = log_evidence(
        log_likelihood, mode.square().sum(), [torch.linalg.eigvalsh(curvature)], torch.tensor(precision)
    )
    covariance = phi @ phi.T / precision + torch.eye(20, dtype=torch.float64)
    exact = MultivariateNormal(torch.zeros(20, dtype=torch.float64), covariance).log_prob(y)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize(("norm", "h"), [(4.0, 5.0), (40.0, 0.5), (3.0, 200.0)])
def test_the_best_precision_solves_mackays_equation(norm: float, h: float) -> None:
    """P equal eigenvalues h: precision |theta|^2 = P h / (h + precision), a quadratic in the precision."""
    number = 12
    expected = (-h * norm + ((h * norm) ** 2 + 4 * norm * number * h) ** 0.5) / (2 * norm)
    found = best_precision(norm, [torch.full((3, 4), h)])
    assert found == pytest.approx(expected, rel=0.01)
    assert found * norm == pytest.approx(number * h / (h + found), rel=0.02)


def test_the_best_precision_of_mixed_eigenvalues_is_the_top_of_the_evidence() -> None:
    values = [torch.tensor([0.0, 0.3, 8.0]), torch.tensor([[100.0, 0.01]])]
    found = best_precision(2.5, values)
    at = {p: log_evidence(0.0, 2.5, values, torch.tensor(p)).item() for p in (0.9 * found, found, 1.1 * found)}
    assert max(at, key=at.__getitem__) == found


@pytest.fixture
def fitted(mle: Run, train_rows: list[Example]) -> Run:
    laplace.fit(mle, train_rows, [])
    return mle


def strategy(run: Run, **options: object) -> LinearizedLaplacePredictive:
    made = laplace.predictive(run, **options)  # type: ignore[arg-type]
    assert isinstance(made, LinearizedLaplacePredictive)
    return made


def test_the_logits_covariance_is_the_sum_of_dense_ones(fitted: Run, test_rows: list[Example]) -> None:
    from scalabl.predictive.kronecker import jacobians, recorded

    made = strategy(fitted)
    batch = fitted.scoring.collate(fitted.encode(test_rows[:2]))
    mean, covariance = made.logit_distribution(fitted.scorer, batch)
    with torch.enable_grad(), recorded(fitted.scorer.model) as passed:
        of_weights = jacobians(fitted.scorer.class_logits(batch), passed)
    expected = torch.zeros_like(covariance, dtype=torch.float64)
    for name, j in of_weights.items():
        matrix = dense(made.blocks[name]).double()
        inverse = torch.linalg.inv(matrix + made.precision * torch.eye(len(matrix)))
        flat = j.flatten(2).double()
        expected += flat @ inverse @ flat.transpose(1, 2)
    torch.testing.assert_close(covariance.double(), expected, rtol=1e-3, atol=1e-5)
    assert set(made.blocks) == set(lora_matrices(fitted.scorer.model))
    with torch.no_grad():
        torch.testing.assert_close(mean, fitted.scorer.class_logits(batch))


def test_the_linearised_predictive_is_exact_where_the_logits_are_linear() -> None:
    """The output layer's B: class logits are linear in it, so that they are Gaussian with that very covariance."""
    of = scorer(LETTERS, ("lm_head",))
    rows = [one_token(t) for t in (10, 40)]
    name = next(n for n in lora_matrices(of.model) if n.endswith("lora_B"))
    blocks = gauss_newton(of, rows, rank=1024).blocks
    module, precision = lora_matrices(of.model)[name], 0.5
    made = LinearizedLaplacePredictive({n: b for n, b in blocks.items() if n == name}, precision)
    for other in lora_matrices(of.model):
        if other != name:  # A is held: no variance is asked of it
            made.blocks = {**made.blocks, other: _certain(blocks[other])}
    batch = of.scoring.collate(rows)
    mean, covariance = made.logit_distribution(of, batch)
    # draws of B from its posterior, pushed through the whole model
    block = blocks[name]
    generator, logits, number = torch.Generator().manual_seed(0), [], 1500
    before = module.weight.detach().clone()
    scale = (block.eigenvalues + precision).rsqrt()
    with torch.no_grad():
        for _ in range(number):
            normal = torch.randn(scale.shape, generator=generator)
            module.weight.copy_(before + block.out_vectors @ (scale * normal) @ block.in_vectors.T)
            logits.append(of.class_logits(batch))
        module.weight.copy_(before)
    drawn = torch.stack(logits)[..., :3]
    for i in range(len(rows)):
        centred = drawn[:, i] - mean[i, :3]
        largest = covariance[i, :3, :3].diagonal().max()
        assert (centred.mean(0).abs() < 5 * (largest / number).sqrt()).all()
        torch.testing.assert_close(
            centred.T @ centred / number, covariance[i, :3, :3], atol=0.15 * largest.item(), rtol=0
        )


def _certain(block: object) -> object:
    """A block whose logit covariance is zero."""

    class Certain:
        def logit_covariances(self, jacobian: Tensor, precisions: Sequence[float]) -> Tensor:
            return torch.zeros(len(precisions), *jacobian.shape[:2], jacobian.shape[1])

    return Certain()


def test_draws_are_of_the_joint_gaussian(fitted: Run, test_rows: list[Example]) -> None:
    made = strategy(fitted, samples=20_000)
    made.precision = 0.05  # much uncertainty, so that a difference shows
    batch = fitted.scoring.collate(fitted.encode(test_rows[:3]))
    mean, covariance = made.logit_distribution(fitted.scorer, batch)
    ours = made(fitted.scorer, batch)
    assert ours.shape == (20_000, 3, mean.shape[1])
    torch.manual_seed(0)
    for i, row in enumerate(test_rows[:3]):
        real = len(row.choices)
        gaussian = MultivariateNormal(mean[i, :real], covariance[i, :real, :real] + 1e-5 * torch.eye(real))
        expected = gaussian.sample((100_000,)).softmax(-1).mean(0)
        torch.testing.assert_close(ours[:, i, :real].exp().mean(0), expected, atol=0.01, rtol=0)
        assert (expected - mean[i, :real].softmax(-1)).abs().max() > 0.01


def test_probit_is_mackays_scaling(fitted: Run, test_rows: list[Example]) -> None:
    made = strategy(fitted, link="probit")
    batch = fitted.scoring.collate(fitted.encode(test_rows))
    mean, covariance = made.logit_distribution(fitted.scorer, batch)
    scaled = mean / (1 + torch.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()
    torch.testing.assert_close(made(fitted.scorer, batch)[0], scaled.log_softmax(-1))


def test_a_prior_that_allows_nothing_leaves_the_adapters_prediction(fitted: Run, test_rows: list[Example]) -> None:
    mean = predict(fitted.scorer, fitted.encode(test_rows), MeanPredictive())
    for link in ("sample", "probit"):
        made = strategy(fitted, link=link)
        made.precision = 1e12
        certain = average(predict(fitted.scorer, fitted.encode(test_rows), made))
        torch.testing.assert_close(certain.float(), mean[0].exp(), atol=1e-3, rtol=0)
    made = strategy(fitted)
    made.precision = 1e-2
    unsure = average(predict(fitted.scorer, fitted.encode(test_rows), made))
    assert unsure.amax(-1).mean() < mean[0].exp().amax(-1).mean()


def test_what_was_fitted_is_written_down(trained: Callable[..., Path], train_rows: list[Example]) -> None:
    run = load_run(trained("mle", seed=3))
    facts = laplace.fit(run, train_rows, [])
    norm = sum(m.weight.double().square().sum().item() for m in lora_matrices(run.scorer.model).values())
    assert facts["squared_norm"] == pytest.approx(norm) and facts["rows"] == len(train_rows)
    values = [b.eigenvalues.double() for b in strategy(run).blocks.values()]
    assert facts["prior_precision"] == pytest.approx(best_precision(norm, values), rel=1e-6)
    low = laplace.fit(run, train_rows, [], rank=6)
    assert low["rank"] == 6 and strategy(run).blocks.keys() == {n for n in lora_matrices(run.scorer.model)}


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UserError, match="samples is 0"):
        LinearizedLaplacePredictive({}, 1.0, samples=0)
    with pytest.raises(UserError, match="link is 'bridge'"):
        LinearizedLaplacePredictive({}, 1.0, link="bridge")  # type: ignore[arg-type]
