"""The linearised predictive: its Jacobian, its Gaussian, and how close it comes to a long Monte Carlo average."""

import pytest
import torch
from tiny_base import adapted, loaded, questions

from scalabl.core.errors import UserError
from scalabl.metrics.uncertainty import average
from scalabl.predictive import AutoPredictive, LinearizedPredictive, MonteCarloPredictive, Predictive, predict
from scalabl.predictive.linearized import layer_variances, logit_gaussian, matrix_root
from scalabl.scoring import Continuation, Letters, Scorer
from scalabl.scoring.trunk import Trunk
from scalabl.tuner import stochastic_layers


def scorer_with(sigma: float, *, covariance: str = "diagonal", letters: bool = False) -> Scorer:
    model = adapted(last=2, covariance=covariance)
    _, tokenizer = loaded()
    with torch.no_grad():
        for number, leaf in enumerate(stochastic_layers(model).values()):
            leaf.posterior.log_std.fill_(torch.tensor(sigma).log())
            if covariance == "full":
                generator = torch.Generator().manual_seed(number)
                leaf.posterior.lower.copy_(sigma * torch.randn(leaf.posterior.lower.shape, generator=generator))
    return Scorer(model.eval(), Letters(tokenizer) if letters else Continuation(tokenizer), Trunk(model))


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("letters", [False, True])
def test_the_covariance_is_that_of_finite_differences(covariance: str, letters: bool) -> None:
    scorer = scorer_with(0.1, covariance=covariance, letters=letters)
    batch = scorer.scoring.collate([scorer.scoring.encode(row) for row in questions(4)])
    mean, found = logit_gaussian(scorer, batch)
    with torch.no_grad():
        torch.testing.assert_close(mean, scorer.class_logits(batch))
    expected, step = torch.zeros_like(found), 1e-2
    for leaf in stochastic_layers(scorer.model).values():
        columns, before = [], leaf.posterior.log_mean.detach().clone()
        for j in range(leaf.out_features):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    moved = before.exp()
                    moved[j] += sign * step
                    leaf.posterior.log_mean.copy_(moved.log())
                    ends.append(scorer.class_logits(batch))
            columns.append((ends[0] - ends[1]) / (2 * step))
        with torch.no_grad():
            leaf.posterior.log_mean.copy_(before)
        slopes = torch.stack(columns, dim=-1).nan_to_num()  # missing choices: -inf minus -inf
        contrast = slopes[:, 1:] - slopes[:, :1]
        absent = torch.arange(1, mean.shape[1]) >= batch.num_choices[:, None]
        contrast = contrast.masked_fill(absent[..., None], 0)
        expected += (contrast @ leaf.posterior.covariance() @ contrast.transpose(1, 2)).detach()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-6)
    assert found.abs().max() > 1e-4  # the posterior does reach the logits


def test_it_is_nearer_to_a_long_average_than_ten_samples_are() -> None:
    scorer = scorer_with(0.05)
    rows = [scorer.scoring.encode(row) for row in questions(6)]
    truth = average(predict(scorer, rows, MonteCarloPredictive(1000, seed=1, draws="antithetic")))
    linearized = average(predict(scorer, rows, LinearizedPredictive(256)))
    ten = [average(predict(scorer, rows, MonteCarloPredictive(10, seed=seed))) for seed in range(2, 8)]
    error = (linearized - truth).abs().mean()
    assert error < 0.5 * torch.stack([(p - truth).abs().mean() for p in ten]).mean()


def test_missing_choices_and_batches() -> None:
    scorer = scorer_with(0.2)
    rows = [scorer.scoring.encode(row) for row in questions(7)]
    together = predict(scorer, rows, LinearizedPredictive(32), batch_size=7)
    apart = predict(scorer, rows, LinearizedPredictive(32), batch_size=2)
    torch.testing.assert_close(together, apart, atol=2e-4, rtol=1e-4)
    for i, row in enumerate(rows):
        assert (together[:, i, row.num_choices :] == -torch.inf).all()
        torch.testing.assert_close(together[:, i].exp().sum(-1), torch.ones(32))


def test_nothing_is_left_behind_in_the_model() -> None:
    scorer = scorer_with(0.2)
    rows = [scorer.scoring.encode(row) for row in questions(2)]
    predict(scorer, rows, LinearizedPredictive(8))
    assert all(parameter.grad is None for parameter in scorer.model.parameters())
    assert all(leaf.state == "auto" for leaf in stochastic_layers(scorer.model).values())


def test_matrix_root_of_a_singular_matrix() -> None:
    vector = torch.tensor([[1.0], [2.0], [0.0]])
    root = matrix_root(vector @ vector.T)
    torch.testing.assert_close(root @ root.T, vector @ vector.T)


@pytest.mark.parametrize("predictive", [LinearizedPredictive(64), AutoPredictive(4)])
def test_inference_mode_around_it_changes_nothing(predictive: Predictive) -> None:
    scorer = scorer_with(0.1)
    rows = [scorer.scoring.encode(row) for row in questions(9)]
    expected = predict(scorer, rows, predictive)
    with torch.inference_mode():
        assert torch.equal(predict(scorer, rows, predictive), expected)


def test_inference_mode_around_the_gaussian_and_the_shares() -> None:
    scorer = scorer_with(0.1)
    rows = [scorer.scoring.encode(row) for row in questions(4)]
    expected = logit_gaussian(scorer, scorer.scoring.collate(rows)), layer_variances(scorer, rows)
    with torch.inference_mode():
        found = logit_gaussian(scorer, scorer.scoring.collate(rows)), layer_variances(scorer, rows)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == expected[1]


def test_a_model_loaded_under_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        scorer = scorer_with(0.1)
        rows = [scorer.scoring.encode(row) for row in questions(2)]
        with pytest.raises(UserError, match="loaded under torch.inference_mode.*load it outside, or use Monte Carlo"):
            predict(scorer, rows, LinearizedPredictive(8))
        assert predict(scorer, rows, MonteCarloPredictive(2)).isfinite().any()
