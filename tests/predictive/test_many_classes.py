"""Heads of many classes: the linearised predictive of all of them, and of the most probable ones and the rest."""

import pytest
import torch
from peft import get_peft_model
from tiny_base import perturb, tiny_encoder

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics.uncertainty import average, decompose
from scalabl.predictive import AutoPredictive, LinearizedPredictive, MonteCarloPredictive, predict
from scalabl.predictive.cost import cost_of
from scalabl.predictive.head_features import HeadFeatures, feature_variance, root_of
from scalabl.predictive.linearized import gaussian_points
from scalabl.predictive.top_classes import Groups
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


def test_groups_keep_the_probabilities_and_the_uncertainty_between_them() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 9, generator=generator, dtype=torch.float64)
    logits[1, 6:] = logits[2, 2:] = -torch.inf  # rows with fewer choices, and without a rest
    deviations = torch.randn(5, 3, 9, generator=generator, dtype=torch.float64)
    for number in range(1, 9):
        groups = Groups.of(logits, number)
        of_groups = groups.mean.softmax(dim=-1)
        torch.testing.assert_close(groups.spread(of_groups.log()[None])[0], logits.log_softmax(dim=-1))
        # the gradients are those of the groups' log probabilities
        step = 1e-6 * deviations[0].masked_fill(~logits.isfinite(), 0)
        moved = [
            torch.cat([(logits + sign * step).gather(1, groups.top),
                       (logits + sign * step).scatter(1, groups.top, -torch.inf).logsumexp(1, keepdim=True)], 1)
            for sign in (1, -1)
        ]  # fmt: skip
        slopes = ((moved[0] - moved[1]) / 2).nan_to_num(0.0)
        expected = torch.where(groups.mean[:, 1:].isfinite(), slopes[:, 1:] - slopes[:, :1], 0.0)
        torch.testing.assert_close((groups.contrasts @ step[:, :, None])[..., 0], expected, atol=1e-12, rtol=1e-4)


def test_top_classes_are_as_uncertain_as_all_of_them_make_them() -> None:
    scorer, rows = wide(12)
    whole = predict(scorer, rows, LinearizedPredictive(512))
    assert torch.equal(predict(scorer, rows, LinearizedPredictive(512, top_classes=11)), whole)
    parts = []
    for top in (1, 3, 10):
        found = predict(scorer, rows, LinearizedPredictive(512, top_classes=top), batch_size=3)
        torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(512, len(rows)))
        best = whole.mean(dim=0).argmax(dim=-1)
        spread, expected = (each.exp()[:, range(len(rows)), best].std(dim=0) for each in (found, whole))
        torch.testing.assert_close(spread, expected, rtol=0.15, atol=1e-4)
        parts.append(decompose(found).epistemic.mean())
    assert parts[0] < parts[1] < parts[2] < 1.03 * decompose(whole).epistemic.mean()
    assert parts[2] > 0.97 * decompose(whole).epistemic.mean()


def test_the_contrast_is_the_one_of_largest_part_in_the_epistemic_uncertainty() -> None:
    generator = torch.Generator().manual_seed(0)
    root = root_of(torch.randn(9, 4, generator=generator))
    logits = 2 * torch.randn(5, 9, generator=generator)
    features = HeadFeatures(root, logits)
    p = logits.softmax(dim=-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eig(curvature @ root @ root.T)
    largest = values.real.argmax(dim=-1)
    expected = vectors.real[torch.arange(5), :, largest]
    alike = torch.nn.functional.cosine_similarity(features.contrast, expected, dim=-1).abs()
    assert alike.min() > 0.95 and alike.mean() > 0.99  # eight iterations
    sure = HeadFeatures(root, torch.tensor([[200.0] + [0.0] * 8]))
    assert (sure.contrast == 0).all() and sure.shift(torch.zeros(1), torch.randn(3, 4)).isfinite().all()


def test_the_shift_has_the_contrasts_own_variance_and_the_heads_in_all_else() -> None:
    generator = torch.Generator().manual_seed(1)
    root = root_of(torch.randn(6, 4, generator=generator))
    features = HeadFeatures(root, torch.randn(2, 6, generator=generator))
    c, typical = features.contrast.double(), (root @ root.T).double()
    m = torch.einsum("bc,cd,bd->b", c, typical, c)
    variance = m * torch.tensor([16.0, 1.0])
    noise = torch.randn(200_000, 4, generator=generator)
    shift = features.shift(variance.float(), noise).double()
    found = torch.einsum("pbc,pbd->bcd", shift, shift) / len(noise)
    g = (c @ typical) / m[:, None]
    outer = g[:, :, None] * g[:, None, :]
    k = torch.tensor([2.0, 1.0])  # 16^(1/4)
    expected = k[:, None, None] * (typical - m[:, None, None] * outer) + variance[:, None, None] * outer
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_alpha_is_that_of_features_that_are_alike_in_every_direction() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    z = (0.3**0.5 * torch.randn(4000, 5, generator=generator, dtype=torch.float64)) @ weight.T
    found = feature_variance(root_of(weight).double(), (z + torch.randn(4000, 1, generator=generator))[:, None])
    assert abs(found - 0.3) < 0.02


def test_auto_takes_one_contrast_of_a_head_where_it_tells_what_particles_do() -> None:
    scorer, rows = wide(40, sigma=0.03)
    auto = AutoPredictive(20, seed=2)
    found = predict(scorer, rows, auto)
    choice = auto.choice
    assert choice is not None and isinstance(choice.predictive, LinearizedPredictive), choice
    assert choice.name.startswith("linearized, one contrast") and choice.predictive.feature_variance
    cost = cost_of(scorer, rows, 8)
    assert choice.costs["linearized, one contrast"] == cost.linearized(1, 1) < 2 < cost.mc(20, 1)
    assert cost.output == 40 * 32  # the head's, not a vocabulary's
    assert "nats off in the epistemic part" in choice.sentence and "40 choices would take" not in choice.sentence
    long = predict(scorer, rows, MonteCarloPredictive(400, seed=9, draws="antithetic"))
    several = [predict(scorer, rows, MonteCarloPredictive(20, seed=seed)) for seed in range(4)]
    for figure in (average, lambda each: decompose(each).epistemic):
        noise = torch.stack([(figure(each) - figure(long)).square().mean() for each in several]).mean().sqrt()
        assert (figure(found) - figure(long)).square().mean().sqrt() < 1.5 * noise
    # another process that is told what was chosen predicts alike, and so do batches of other sizes
    other = AutoPredictive(20, seed=2).made(
        "linearized", choice.predictive.stochastic_layers, choice.predictive.feature_variance
    )
    assert torch.equal(predict(scorer, rows, other), found)
    torch.testing.assert_close(predict(scorer, rows, other, batch_size=3), found, atol=1e-4, rtol=1e-4)
    settings = PredictionSettings("linearized", feature_variance=choice.predictive.feature_variance)
    assert PredictionSettings.from_dict(settings.to_dict()) == settings
    with pytest.raises(UserError, match="for linearized alone"):
        PredictionSettings(feature_variance=0.1)


def test_what_was_tried_and_refused_can_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, rows = wide(40, sigma=0.03)
    monkeypatch.setattr("scalabl.predictive.auto.MARGIN", 0.0)
    auto = AutoPredictive(20, seed=2)
    auto.chosen(scorer, rows)
    assert auto.choice is not None and auto.choice.name == "mc, N = 20"
    (refused,) = auto.choice.refused.values()
    assert isinstance(refused, LinearizedPredictive) and refused.feature_variance
    assert list(auto.choice.refused) == ["linearized, one contrast"] and "one contrast" in auto.choice.sentence


def test_a_large_scale_of_the_posterior_is_seen() -> None:
    scorer, rows = wide(12)
    one, three = (LinearizedPredictive(256, feature_variance=0.01, scale=scale) for scale in (1.0, 3.0))
    parts = [decompose(predict(scorer, rows, each)).epistemic.mean() for each in (one, three)]
    assert 4 < parts[1] / parts[0] < 9.5
