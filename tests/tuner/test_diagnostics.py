"""What a posterior looks like, and the sentences about one that has gone wrong."""

import pytest
import torch
from peft import PeftModel
from tiny_base import adapted
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.posterior import DiagonalGaussian, Prior
from scalabl.tuner import kl_divergence, prior_of, stochastic_layers
from scalabl.tuner.diagnostics import LayerSummary, summarize, unconverged, warnings_of, weights_of


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
        (0.1, 0.3, "the noise is larger than the mean of s"),
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


def test_a_posterior_that_was_still_moving_is_named() -> None:
    def log(values: list[float]) -> list[dict[str, float]]:
        return [{"step": float(i), "kl": kl} for i, kl in enumerate(values)] + [{"train_runtime": 1.0}]

    assert unconverged(log([100.0, 60.0, 42.0, 41.0, 40.5])) == []
    (sentence,) = unconverged(log([350.0, 270.0, 216.0, 143.0, 116.0]))
    assert "216 nats half-way, 116 at the end" in sentence
    assert unconverged(log([100.0, 10.0])) == []  # too short to say
    assert unconverged([{"loss": 1.0}] * 9) == []  # a plain LoRA
