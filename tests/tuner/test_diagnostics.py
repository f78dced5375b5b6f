"""What a posterior looks like, and the sentences about one that has gone wrong."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_base import adapted
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.posterior import DiagonalGaussian, Prior
from scalabl.tuner import kl_divergence, prior_of, stochastic_layers
from scalabl.tuner.diagnostics import Drift, LayerSummary, drift_of, summarize, warnings_of, weights_of


def summaries(model: PeftModel) -> list[LayerSummary]:
    return summarize(weights_of(model), prior_of(model))


@pytest.fixture
def model() -> PeftModel:
    """Six layers (q and v of three decoder layers) in good order."""
    model = adapted()
    for leaf in stochastic_layers(model).values():
        leaf.posterior = DiagonalGaussian(torch.full((4,), 0.8), torch.full((4,), 0.1))
    return model


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_summary_is_what_its_words_say(covariance: str) -> None:
    model = adapted(covariance=covariance, use_rslora=True)
    rows = summaries(model)
    leaves = stochastic_layers(model)
    assert [row.name for row in rows] == list(leaves) and len(rows) == 6
    assert sum(row.kl for row in rows) == pytest.approx(kl_divergence(model).item(), rel=1e-5)
    for row, leaf in zip(rows, leaves.values(), strict=True):
        mean, covariance_matrix = leaf.posterior.mean, leaf.posterior.covariance()
        sigma: Tensor = covariance_matrix.diagonal().sqrt()
        assert row.r == 4 and row.mean == pytest.approx(mean.mean().item())
        assert row.sigma == pytest.approx(sigma.mean().item(), rel=1e-5)
        assert row.noise == pytest.approx((sigma / mean).square().mean().sqrt().item(), rel=1e-5)
        layer = model.get_submodule(f"base_model.model.{row.name}")
        # the change of the layer's weight, as PEFT itself would merge it
        change = layer.get_delta_weight("default").norm().item()  # type: ignore[operator, union-attr]
        assert row.effect == pytest.approx(change, rel=1e-4) and change > 0


def test_a_posterior_in_good_order_has_no_warnings(model: PeftModel) -> None:
    assert warnings_of(summaries(model)) == []


@pytest.mark.parametrize(
    ("mean", "sigma", "sentence"),
    [
        (0.8, 1e-4, "sigma has collapsed to 0"),
        (2.0, 1.5, "sigma has grown past the prior's"),
        (0.1, 0.15, "the noise is larger than the mean of s"),
    ],
)
def test_each_failure_is_named_with_its_layers(model: PeftModel, mean: float, sigma: float, sentence: str) -> None:
    leaves = stochastic_layers(model)
    for name in list(leaves)[2:4]:
        leaves[name].posterior = DiagonalGaussian(torch.full((4,), mean), torch.full((4,), sigma))
    (warning,) = warnings_of(summaries(model))
    assert warning.startswith(f"2 of 6 layers (model.layers.1.self_attn.q_proj first): {sentence}")


@pytest.mark.parametrize(("mean", "sigma", "named"), [(0.6, 0.18, True), (0.6, 0.1, False), (0.9, 0.2, False)])
def test_a_posterior_that_is_its_prior_is_named(model: PeftModel, mean: float, sigma: float, named: bool) -> None:
    for leaf in stochastic_layers(model).values():
        leaf.posterior = DiagonalGaussian(torch.full((4,), mean), torch.full((4,), sigma))
    warnings = warnings_of(summarize(weights_of(model), Prior(0.577, 0.2)))
    assert [warning.partition(": ")[2].startswith("the posterior is the prior") for warning in warnings] == [
        True
    ] * named


def test_an_untrained_layer_is_named(model: PeftModel) -> None:
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.2.self_attn.v_proj").lora_B["default"].weight.zero_()  # type: ignore[union-attr, operator, index]
    (warning,) = warnings_of(summaries(model))
    assert warning.startswith("1 of 6 layers (model.layers.2.self_attn.v_proj first): B is zero")


def test_sigma_is_held_against_the_prior_of_the_adapter(model: PeftModel) -> None:
    layers = weights_of(model)
    assert any("grown past" in warning for warning in warnings_of(summarize(layers, Prior(0.0, 0.05))))
    assert any("collapsed" in warning for warning in warnings_of(summarize(layers, Prior(0.0, 200.0))))


@pytest.mark.parametrize(
    ("mean", "sigma", "fixed", "empirical"), [(50.0, 0.03, [], ["collapsed"]), (4.0, 3.0, ["grown past"], [])]
)
def test_sigma_is_held_against_the_layers_own_prior_where_it_is_empirical(
    model: PeftModel, mean: float, sigma: float, fixed: list[str], empirical: list[str]
) -> None:
    for leaf in stochastic_layers(model).values():
        leaf.posterior = DiagonalGaussian(torch.full((4,), mean), torch.full((4,), sigma))
    layers = weights_of(model)
    for prior, std, words in ((Prior(), 1.0, fixed), (Prior(empirical=True), (mean**2 + sigma**2) ** 0.5, empirical)):
        rows = summarize(layers, prior)
        assert all(row.prior_std == pytest.approx(std, rel=1e-5) for row in rows)
        warnings = warnings_of(rows)
        assert len(warnings) == len(words)
        assert all(word in warning for word, warning in zip(words, warnings, strict=True))


def test_a_plain_lora_has_no_posterior_to_summarise() -> None:
    from peft import LoraConfig, get_peft_model
    from tiny_base import loaded

    with pytest.raises(UserError, match="No stochastic layer"):
        weights_of(get_peft_model(loaded()[0], LoraConfig(target_modules=["q_proj"])))


RECIPE = {"steps": 200, "learning_rate": 1e-3, "variational_learning_rate": 2e-2, "optimizer": "adamw_torch"}


def log_of(sigma: Callable[[float], float], bayesianized: bool = False, **recipe: Any) -> Drift | None:
    """The drift of a training whose rate falls linearly to zero, of a sigma by the sum of its rates: 2 in all."""
    said = RECIPE | {"prior_mean": 0.577} | recipe
    steps, rate = said["steps"], said["learning_rate"]
    entries = []
    for step in range(steps // 20, steps + 1, steps // 20):
        left = 1 - step / steps
        entries.append({"step": step, "learning_rate": rate * left, "elbo/sigma_mean": sigma(2 - 2 * left**2)})
    return drift_of([*entries, {"train_runtime": 1.0}], said, bayesianized)


def layers_of(model: PeftModel, sigma: float, prior: Prior, mean: float = 0.577) -> list[LayerSummary]:
    for leaf in stochastic_layers(model).values():
        leaf.posterior = DiagonalGaussian(torch.full((4,), mean), torch.full((4,), sigma))
    return summarize(weights_of(model), prior)


@pytest.mark.parametrize("speed", [0.9, 0.3, 0.0, -0.6])
def test_a_drift_is_the_slope_of_sigma_over_the_last_half_of_the_rates(speed: float) -> None:
    # a slope of its own before the half, which does not count
    drift = log_of(lambda spent: 0.05 * math.exp(0.9 * min(spent, 1) + speed * max(spent - 1, 0)))
    assert drift is not None
    assert drift.speed == pytest.approx(speed, abs=0.03) and drift.reach == pytest.approx(2, rel=0.01)
    assert drift.ended == pytest.approx(0.05 * math.exp(0.9 + speed))


def test_a_log_that_does_not_say_how_sigma_moved_has_no_drift() -> None:
    entry = {"learning_rate": 1e-3, "elbo/sigma_mean": 0.1}
    assert drift_of([entry | {"step": step} for step in (10, 20, 30)], RECIPE) is None  # too short
    assert drift_of([{"step": step, "loss": 1.0} for step in range(9)], RECIPE) is None  # a plain LoRA
    moved = [{"step": s, "learning_rate": 1e-3, "elbo/sigma_mean": 0.1 * s} for s in range(1, 9)]
    assert drift_of(moved, RECIPE) is not None and drift_of(moved, RECIPE | {"optimizer": "sgd"}) is None
    for name, value in (("learning_rate", 0.0), ("learning_rate", math.inf), ("step", math.nan), ("step", 1)):
        assert drift_of([entry | {name: value} for entry in moved], RECIPE) is None  # altered


def test_a_sigma_that_stood_is_told_from_one_that_moved(model: PeftModel) -> None:
    prior = Prior(0.577, 0.4)
    stood = log_of(lambda spent: 0.05 * math.exp(min(spent, 0.9)))
    assert warnings_of(layers_of(model, 0.05 * math.exp(0.9), prior), stood) == []
    moved = log_of(lambda spent: 0.05 * math.exp(0.5 * spent))
    (sentence,) = warnings_of(layers_of(model, 0.05 * math.e, prior), moved)
    assert "still rising when training ended (0.083 to 0.14" in sentence
    # log(0.4 / 0.136) = 1.08 at 0.5 a unit: 2.16 units beside the 2 that there were, and as much again
    assert sentence.endswith("train with --steps 840.")
    falling = log_of(lambda spent: 0.2 * math.exp(-0.6 * spent))
    (sentence,) = warnings_of(layers_of(model, 0.2 * math.exp(-1.2), prior), falling)
    assert "still falling" in sentence and sentence.endswith("train with --steps 800.")


def test_under_a_wide_prior_it_is_the_prior_that_is_to_change(model: PeftModel) -> None:
    # more steps would go on to the prior's 1, where noise is larger than the mean of s
    moved = log_of(lambda spent: 0.05 * math.exp(0.9 * spent), prior_mean=0.0)
    (sentence,) = warnings_of(layers_of(model, 0.3, Prior()), moved)
    assert "train with --prior-mean 0.577 --prior-std 0.2;" in sentence
    # 0.1 would not reach 0.2 in time: log(2) = 0.69 at 0.9 a unit beside the 2 that there were, and as much again
    (sentence,) = warnings_of(layers_of(model, 0.1, Prior()), moved)
    assert "train with --prior-mean 0.577 --prior-std 0.2 --steps 560;" in sentence
    moved = log_of(lambda spent: 0.05 * math.exp(0.9 * spent), prior_mean=1.0)  # a given adapter's, relative to it
    (sentence,) = warnings_of(layers_of(model, 0.3, Prior(1.0, 2.0), mean=1.0), moved)
    assert "train with --prior-std 0.35 --steps 440;" in sentence
    moved = log_of(lambda spent: 0.05 * math.exp(0.9 * spent), bayesianized=True, prior_mean=0.0)  # s begins at 1
    (sentence,) = warnings_of(layers_of(model, 0.3, Prior(0.0, 2.0), mean=1.0), moved)
    assert "bayesianize with --prior-std 0.35 --steps 440;" in sentence


@pytest.mark.parametrize(
    ("sigma", "speed", "prior", "words"),
    [
        (0.18, 0.9, Prior(0.577, 0.2), "the posterior is the prior"),  # it has arrived, however fast it came
        (0.19, -0.9, Prior(0.577, 0.2), "still falling"),  # it leaves: the rows do say something
        (0.26, 0.9, Prior(0.577, 0.2), "grown past the prior's"),
        (1e-4, -0.9, Prior(0.577, 0.2), "collapsed to 0"),
    ],
)
def test_a_moving_sigma_and_its_prior_are_one_sentence(
    model: PeftModel, sigma: float, speed: float, prior: Prior, words: str
) -> None:
    drift = log_of(lambda spent: sigma * math.exp(speed * (spent - 2)))
    (sentence,) = warnings_of(layers_of(model, sigma, prior), drift)
    assert words in sentence
