"""Heads of many classes: the linearised predictive beyond 26 of them."""

import torch
from peft import get_peft_model
from tiny_base import perturb, tiny_encoder

from scalabl.data import Example
from scalabl.metrics.uncertainty import average, decompose
from scalabl.predictive import LinearizedPredictive, MonteCarloPredictive, predict
from scalabl.predictive.linearized import gaussian_points
from scalabl.runs.models import load_base
from scalabl.scoring import Encoded, Scorer
from scalabl.scoring.head import Head
from scalabl.scoring.trunk import Trunk
from scalabl.tuner import ScalaBLConfig, stochastic_layers

WORDS = ("red", "blue", "green", "stone", "a long answer", "yes", "no", "ninety-nine", "bee", "wide open")


def wide(classes: int, sigma: float = 0.1) -> tuple[Scorer, list[Encoded]]:
    """A tiny encoder with a head of so many classes that are told apart, and rows."""
    labels = tuple(f"about {i}" for i in range(classes))
    torch.manual_seed(0)
    base, tokenizer = load_base(str(tiny_encoder()), labels=labels)
    config = ScalaBLConfig(
        r=3, task_type="SEQ_CLS", target_modules=["query", "value", "dense"], layers_to_transform=[1, 2],
        modules_to_save=["classifier"], exclude_modules=".*pooler.*",
    )  # fmt: skip
    model = get_peft_model(base, config).eval()
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name and parameter.dim() > 1:
                parameter.mul_(40)
        for leaf in stochastic_layers(model).values():
            leaf.posterior.log_std.fill_(torch.tensor(sigma).log())
    scorer = Scorer(model, Head(tokenizer, labels=labels, max_length=100), Trunk(model))
    texts = [f"{WORDS[i % 10]} {WORDS[(3 * i + 1) % 10]}" * (1 + i % 2) for i in range(10)]
    return scorer, [scorer.scoring.encode(Example(str(i), text, labels, 0)) for i, text in enumerate(texts)]


def test_forty_classes_are_linearised_as_a_long_average_says() -> None:
    scorer, rows = wide(40, sigma=0.05)
    long = predict(scorer, rows, MonteCarloPredictive(1000, seed=5, draws="antithetic"))
    ten = predict(scorer, rows, MonteCarloPredictive(10))
    linear = predict(scorer, rows, LinearizedPredictive(256))
    gap, noise = ((average(each) - average(long)).square().mean().sqrt() for each in (linear, ten))
    assert gap < noise / 2 and noise > 1e-4
    epistemic = decompose(long).epistemic
    assert epistemic.mean() > 1e-3
    torch.testing.assert_close(decompose(linear).epistemic, epistemic, rtol=0.25, atol=2e-4)


def test_points_of_few_classes_are_the_first_of_many() -> None:
    many = gaussian_points(64, 300, 3)
    for few in (3, 25, 26, 149):
        torch.testing.assert_close(gaussian_points(64, few, 3), many[:, :few], rtol=0, atol=1e-12)
    assert many.mean(dim=0).abs().max() < 0.05 and many.square().mean(dim=0).sub(1).abs().max() < 0.4
    correlations = torch.corrcoef(many.T) - torch.eye(300, dtype=many.dtype)
    assert correlations.abs().max() < 0.7 and correlations.square().mean().sqrt() < 0.14  # of independent ones 0.126
    engine = torch.quasirandom.SobolEngine(25, scramble=True, seed=3)
    assert torch.equal(many[:, :25], torch.special.ndtri(engine.draw(64, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)))
    assert gaussian_points(1, 30, 0).isfinite().all()
