"""The scale tau of a posterior: s = mean + tau scale noise, and tau^2 J Sigma J^T, in every predictive that has one."""

from dataclasses import replace

import pytest
import torch
from tiny_base import adapted, loaded, questions
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics.uncertainty import apply_temperature, average
from scalabl.posterior.joint import JointGaussian
from scalabl.predictive import AutoPredictive, LinearizedPredictive, MeanPredictive, MonteCarloPredictive, predict
from scalabl.predictive.adaptive import AdaptivePredictive, with_sampling
from scalabl.predictive.auto import with_scale
from scalabl.predictive.lora_particles import DropoutPredictive, WeightNoisePredictive, lora_matrices
from scalabl.predictive.sampling import Sampling
from scalabl.scoring import Continuation, Scorer
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.trunk import Trunk
from scalabl.tuner import stochastic_layers
from scalabl.tuner.joint import set_joint
from scalabl.tuner.state import particles


def scorer_of(covariance: str) -> Scorer:
    """Full covariances are those of one over all layers."""
    model = adapted(last=2, covariance="diagonal" if covariance == "diagonal" else "full")
    if covariance == "joint":
        ranks = {name: leaf.out_features for name, leaf in stochastic_layers(model).items()}
        noise = torch.randn(sum(ranks.values()), sum(ranks.values()), generator=torch.Generator().manual_seed(0))
        factor = 0.1 * noise.tril(-1) + torch.diag(0.1 + 0.1 * noise.diagonal().abs())
        set_joint(model, JointGaussian(factor, ranks))
    return Scorer(model.eval(), Continuation(loaded()[1]), Trunk(model))


def rows_of(scorer: Scorer, number: int = 6) -> list[Encoded]:
    return [scorer.scoring.encode(row) for row in questions(number)]


@pytest.mark.parametrize("covariance", ["diagonal", "full", "joint"])
def test_particles_lie_tau_times_as_far_from_the_mean(covariance: str) -> None:
    model = scorer_of(covariance).model

    def draws(scale: float) -> list[Tensor]:
        with particles(model, 3, seed=5, scale=scale):
            return [leaf.draw(3, torch.device("cpu")).detach() for leaf in stochastic_layers(model).values()]

    means = [leaf.posterior.mean.detach() for leaf in stochastic_layers(model).values()]
    for mean, one, half, none in zip(means, draws(1.0), draws(0.5), draws(0.0), strict=True):
        torch.testing.assert_close(half, mean + 0.5 * (one - mean))
        assert torch.equal(none, mean.expand(3, -1))
    with particles(model, 3, seed=5):
        as_learnt = [leaf.draw(3, torch.device("cpu")) for leaf in stochastic_layers(model).values()]
    assert all(torch.equal(a, b) for a, b in zip(as_learnt, draws(1.0), strict=True))


def test_every_scale_of_kept_gaussians_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_of("diagonal")
    rows, passes = rows_of(scorer), []
    expected = [predict(scorer, rows, LinearizedPredictive(8, scale=tau), batch_size=4) for tau in (1.0, 0.5, 2.0)]
    once = LinearizedPredictive.jacobian

    def counted(self: LinearizedPredictive, scorer: Scorer, batch: Batch) -> object:
        passes.append(len(batch))
        return once(self, scorer, batch)

    monkeypatch.setattr(LinearizedPredictive, "jacobian", counted)
    kept = LinearizedPredictive(8).keeping()
    for tau, wanted in zip((1.0, 0.5, 2.0), expected, strict=True):
        assert torch.equal(predict(scorer, rows, with_scale(kept, tau), batch_size=4), wanted)
    assert passes == [4, 2]  # the rows of the first
    assert torch.equal(
        predict(scorer, rows[:2], kept, batch_size=2), predict(scorer, rows[:2], LinearizedPredictive(8))
    )
    assert len(passes) == 4  # another batch, and one that keeps nothing
    one = scorer.scoring.collate(rows[:1])
    other = replace(one, segments=torch.where(one.segments == one.segments.max(), 1, one.segments))
    kept(scorer, one)
    assert torch.equal(kept(scorer, other), LinearizedPredictive(8)(scorer, other))  # the same tokens, read otherwise


@pytest.mark.parametrize("covariance", ["diagonal", "joint"])
@pytest.mark.parametrize("kind", [MonteCarloPredictive, LinearizedPredictive])
def test_a_scaled_predictive_is_that_of_a_scaled_posterior(covariance: str, kind: type) -> None:
    scorer = scorer_of(covariance)
    rows, plain = rows_of(scorer), kind(8)
    scaled = predict(scorer, rows, with_scale(plain, 1.7))
    assert torch.equal(predict(scorer, rows, with_scale(plain, 1.0)), predict(scorer, rows, kind(8)))
    assert not torch.allclose(scaled, predict(scorer, rows, plain), atol=1e-3)
    mean = predict(scorer, rows, MeanPredictive())
    torch.testing.assert_close(predict(scorer, rows, with_scale(plain, 0.0))[0], mean[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for leaf in stochastic_layers(scorer.model).values():
            leaf.posterior.log_std += torch.tensor(1.7).log()
            if hasattr(leaf.posterior, "lower"):
                leaf.posterior.lower *= 1.7
    if covariance == "joint":
        from scalabl.tuner.joint import joint_of

        joint = joint_of(scorer.model)
        assert joint is not None
        set_joint(scorer.model, JointGaussian(1.7 * joint.factor, joint.ranks))
    torch.testing.assert_close(scaled, predict(scorer, rows, plain), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("draws", ["independent", "antithetic", "sobol", "moments"])
def test_every_kind_of_draws_has_the_scale(draws: str) -> None:
    scorer = scorer_of("diagonal")
    rows = rows_of(scorer)
    before = predict(scorer, rows, MonteCarloPredictive(6, draws=draws, scale=0.6))
    made = with_sampling(with_scale(MonteCarloPredictive(6), 0.6), Sampling(draws))
    assert torch.equal(predict(scorer, rows, made), before)
    assert not torch.allclose(predict(scorer, rows, MonteCarloPredictive(6, draws=draws)), before, atol=1e-3)


def test_auto_compares_and_takes_what_has_the_scale() -> None:
    scorer = scorer_of("diagonal")
    rows = rows_of(scorer, 12)
    auto = with_scale(AutoPredictive(5, seed=3), 0.1)
    found = predict(scorer, rows, auto)
    assert isinstance(auto, AutoPredictive) and auto.choice is not None
    assert getattr(auto.choice.predictive, "scale") == 0.1  # noqa: B009
    other = with_scale(auto.made("linearized", None), 1.0)
    assert getattr(other, "scale") == 0.1  # noqa: B009
    near = predict(scorer, rows, MonteCarloPredictive(200, scale=0.1, draws="antithetic"))
    torch.testing.assert_close(average(found), average(near), atol=2e-2, rtol=0)
    assert isinstance(with_scale(AutoPredictive(5), 0.0), MeanPredictive)


def test_noise_on_the_weights_is_scaled_and_dropout_is_refused() -> None:
    scorer = scorer_of("diagonal")
    rows = rows_of(scorer)
    names = [name for name in lora_matrices(scorer.model) if name.endswith("lora_B")]
    std = {name: torch.full(lora_matrices(scorer.model)[name].weight.shape, 0.05) for name in names}
    twice = WeightNoisePredictive.of_std({name: 2 * value for name, value in std.items()}, samples=3)
    scaled = with_scale(WeightNoisePredictive.of_std(std, samples=3), 2.0)
    torch.testing.assert_close(predict(scorer, rows, scaled), predict(scorer, rows, twice))
    with pytest.raises(UserError, match="no posterior whose scale could be 2"):
        with_scale(DropoutPredictive(0.1), 2.0)


def test_adaptive_n_settles_answers_by_tempered_particles() -> None:
    scorer = scorer_of("diagonal")
    rows = rows_of(scorer, 12)
    number = 14
    tempered = apply_temperature(predict(scorer, rows, MonteCarloPredictive(number)), 2.5)
    whole = predict(scorer, rows, AdaptivePredictive(MonteCarloPredictive(number), 1.0, temperature=2.5))
    torch.testing.assert_close(whole, tempered, atol=2e-5, rtol=1e-5)
    # a row's particles are tempered, and it stops where these leave no doubt about the threshold
    threshold = float(average(tempered).amax(dim=1).median())
    found = predict(
        scorer, rows, AdaptivePredictive(MonteCarloPredictive(number), 0.9, threshold=threshold, temperature=2.5)
    )
    drawn = found != -torch.inf
    torch.testing.assert_close(found[drawn], tempered[drawn], atol=2e-5, rtol=1e-5)
    assert not drawn.all()
    answered = average(found).amax(dim=1) >= threshold
    assert torch.equal(answered, average(tempered).amax(dim=1) >= threshold)
