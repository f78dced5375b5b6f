"""Heads of many classes: the linearised predictive of all of them, and of the most probable ones and the rest."""

import torch
from peft import get_peft_model
from tiny_base import perturb, tiny_encoder

from scalabl.data import Example
from scalabl.metrics.uncertainty import average, decompose
from scalabl.predictive import AutoPredictive, LinearizedPredictive, MonteCarloPredictive, predict
from scalabl.predictive.cost import cost_of
from scalabl.predictive.linearized import gaussian_points
from scalabl.predictive.top_classes import Groups, left_out
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
    probs, before = logits.softmax(dim=-1), torch.full((3,), torch.inf, dtype=torch.float64)
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
        # variance within the rest + between the groups = all of it
        missing, whole = left_out(probs, deviations, number)
        finite = deviations.masked_fill(~logits.isfinite(), 0)
        of_rest = torch.zeros_like(probs).scatter(1, groups.top, 1).eq(0) * probs
        rest = (of_rest * finite).sum(-1, keepdim=True) / of_rest.sum(-1, keepdim=True).clamp_min(1e-300)
        means = torch.cat([finite.gather(-1, groups.top.expand(5, -1, -1)), rest], dim=-1)
        centred = means - (of_groups * means).sum(-1, keepdim=True)
        torch.testing.assert_close(whole - missing, (of_groups * centred.square()).sum(-1) / 2)
        assert (missing.mean(dim=0) <= before + 1e-12).all()
        before = missing.mean(dim=0)
    assert before.abs().max() < 1e-12


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


def test_auto_takes_the_fewest_classes_that_keep_what_particles_tell() -> None:
    scorer, rows = wide(40, sigma=0.03)
    auto = AutoPredictive(20, seed=2)
    found = predict(scorer, rows, auto)
    choice = auto.choice
    assert choice is not None and isinstance(choice.predictive, LinearizedPredictive)
    top = choice.predictive.top_classes
    assert top is not None and choice.name.startswith(f"linearized, top {top} of the classes")
    cost = cost_of(scorer, rows, 8)
    assert choice.costs[f"linearized, top {top} of the classes"] == cost.linearized(1, top) < cost.mc(20, 1)
    assert cost.output == 40 * 32  # the head's, not a vocabulary's
    assert "leave out" in choice.sentence and "40 choices would take" not in choice.sentence
    long = decompose(predict(scorer, rows, MonteCarloPredictive(400, seed=9, draws="antithetic"))).epistemic
    twenty = [decompose(predict(scorer, rows, MonteCarloPredictive(20, seed=seed))).epistemic for seed in range(4)]
    noise = torch.stack([(each - long).square().mean() for each in twenty]).mean().sqrt()
    assert (decompose(found).epistemic - long).square().mean().sqrt() < 1.5 * noise
    # another process that is told what was chosen predicts alike
    other = AutoPredictive(20, seed=2).made("linearized", choice.predictive.stochastic_layers, top)
    assert torch.equal(predict(scorer, rows, other), found)
