"""`auto`: the cost model against closed forms, and choices that follow from cost, from noise and from the rows."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_base import adapted, loaded, questions

from scalabl.core.errors import UserError
from scalabl.metrics.uncertainty import average
from scalabl.predictive import AutoPredictive, LinearizedPredictive, MonteCarloPredictive, predict
from scalabl.predictive.auto import TRIAL_ROWS, make_predictive, reference_and_variance
from scalabl.predictive.cost import BACKWARD, Cost, cost_of
from scalabl.scoring import Continuation, Encoded, Letters, Scorer
from scalabl.scoring.trunk import Trunk
from scalabl.tuner import stochastic_layers

# without weights to read and without an output layer
PLAIN = Cost(layers=10, layer=1, output=0, saturation=0, tokens=50, positions=4, classes=4, batch=8)


def model_with(sigma: float, last: int = 1) -> PeftModel:
    model = adapted(last=last)
    with torch.no_grad():
        for leaf in stochastic_layers(model).values():
            leaf.posterior.log_std.fill_(torch.tensor(sigma).log())
    return model


def scorer_of(model: PeftModel, trunk: bool = True) -> Scorer:
    return Scorer(model, Continuation(loaded()[1]), Trunk(model) if trunk else None)


def encoded(number: int = 12, choices: tuple[int, ...] = (3, 4, 5)) -> list[Encoded]:
    scoring = Continuation(loaded()[1])
    return [scoring.encode(row) for row in questions(number, choices=choices)]


def test_the_cost_of_particles_and_of_backward_passes() -> None:
    for start, f in ((0, 1.0), (8, 0.2), (10, 0.0)):
        assert PLAIN.mc(10, start) == pytest.approx((1 - f) + 10 * f)
        assert PLAIN.linearized(start) == pytest.approx(1 + 3 * BACKWARD * f)
    assert replace(PLAIN, stored=False).mc(10, 8) == pytest.approx(10)
    assert replace(PLAIN, stored=False).linearized(8) == PLAIN.linearized(8)
    # the output layer is run for every particle, at the positions that are read
    assert replace(PLAIN, output=125).mc(10, 10) == pytest.approx((500 + 10 * 500) / 1000)
    # a shared prompt is not run again for every row
    assert replace(PLAIN, shared=40).mc(10, 8) == pytest.approx(PLAIN.mc(10, 8) / 5)
    assert replace(PLAIN, shared=40).linearized(8) == PLAIN.linearized(8)


def test_weights_that_have_to_be_read_make_particles_cheap_at_small_batches() -> None:
    def mc(batch: int) -> float:
        return replace(PLAIN, saturation=64, tokens=96, batch=batch).mc(10, 0)

    assert mc(1) == pytest.approx((64 + 960) / (64 + 96)) and mc(1) < mc(4) < mc(1000) < 10
    # what the two constants of the model were taken from
    assert (mc(1), mc(4)) == (pytest.approx(6.4, abs=0.2), pytest.approx(8.7, abs=0.3))


def test_the_cost_of_a_real_model() -> None:
    model, rows = model_with(0.1), encoded()
    found = cost_of(scorer_of(model), rows, 4)
    layers = model.get_base_model().model.layers
    assert (found.layers, found.classes, found.batch, found.stored) == (3, 5, 4, True)
    assert found.layer * 3 == sum(p.numel() for p in layers.parameters())
    assert found.output == model.get_base_model().lm_head.weight.numel()
    assert found.tokens == pytest.approx(sum(len(row.input_ids) for row in rows) / 12)
    assert found.positions == pytest.approx(sum(sum(s > 0 for s in row.segments) for row in rows) / 12)
    assert not cost_of(scorer_of(model, trunk=False), rows, 4).stored
    tokenizer = loaded()[1]
    letters = Scorer(model, Letters(tokenizer), Trunk(model))
    assert cost_of(letters, [letters.scoring.encode(row) for row in questions(3)], 8).positions == 1


def test_little_noise_is_linearised_and_the_answers_are_those_of_the_choice() -> None:
    scorer, rows = scorer_of(model_with(0.02)), encoded()
    auto = AutoPredictive(10, seed=3)
    assert auto.choice is None
    found = predict(scorer, rows, auto, batch_size=5)
    choice = auto.choice
    assert choice is not None and choice.name == "linearized" and isinstance(choice.predictive, LinearizedPredictive)
    assert torch.equal(found, predict(scorer, rows, LinearizedPredictive(seed=3), batch_size=5))
    assert choice.costs["linearized"] < choice.costs["mc, N = 10"]
    assert choice.sentence.startswith("auto chose linearized (") and choice.sentence.count(".") >= 1
    assert f"{choice.costs['mc, N = 10']:.1f}" in choice.sentence


def test_what_is_chosen_is_no_further_from_a_long_average_than_n_particles_are() -> None:
    rows = encoded()
    chosen = set()
    for sigma in (0.02, 0.3, 1.0, 3.0):
        scorer = scorer_of(model_with(sigma, last=2))
        auto = AutoPredictive(10)
        found = average(predict(scorer, rows, auto))
        # its own error is less than a tenth of ten particles'
        truth = average(predict(scorer, rows, MonteCarloPredictive(400, seed=1, draws="antithetic")))
        ten = [average(predict(scorer, rows, MonteCarloPredictive(10, seed=seed))) for seed in range(2, 12)]
        noise = torch.stack([(p - truth).square().mean() for p in ten]).mean().sqrt()
        assert auto.choice is not None
        chosen.add(auto.choice.name.split(",")[0])
        assert (found - truth).square().mean().sqrt() <= (1.2 if auto.choice.name.startswith("lin") else 2) * noise
    assert chosen == {"linearized", "mc"}


def test_large_noise_is_left_to_particles() -> None:
    scorer, rows = scorer_of(model_with(3.0, last=2)), encoded()
    auto = AutoPredictive(10, seed=1)
    found = predict(scorer, rows, auto)
    assert auto.choice is not None and auto.choice.name == "mc, N = 10" and "off in probability" in auto.choice.sentence
    assert torch.equal(found, predict(scorer, rows, MonteCarloPredictive(10, seed=1)))


def test_many_choices_are_left_to_particles_and_many_particles_to_the_linearisation() -> None:
    scorer = scorer_of(model_with(0.02, last=3))
    many, few = encoded(12, (8,)), encoded(12, (2,))
    for rows, samples, name in ((many, 2, "mc, N = 2"), (few, 10, "linearized")):
        auto = AutoPredictive(samples)
        auto.chosen(scorer, rows)
        assert auto.choice is not None and auto.choice.name.startswith(name)
    assert "8 choices would take" in sentence_of(scorer, many, 2)


def sentence_of(scorer: Scorer, rows: list[Encoded], samples: int) -> str:
    auto = AutoPredictive(samples)
    auto.chosen(scorer, rows)
    assert auto.choice is not None
    return auto.choice.sentence


def test_layers_that_hold_no_variance_are_left_out() -> None:
    model = model_with(1e-6, last=3)
    top = [leaf for name, leaf in stochastic_layers(model).items() if ".layers.2." in name]
    with torch.no_grad():
        for leaf in top:
            leaf.posterior.log_std.fill_(torch.tensor(0.02).log())
    scorer, rows = scorer_of(model), encoded()
    auto = AutoPredictive()
    found = predict(scorer, rows, auto)
    choice = auto.choice
    assert choice is not None and choice.name == "linearized, s in last:1" and len(choice.costs) == 3
    assert choice.costs[choice.name] < choice.costs["linearized"]
    torch.testing.assert_close(found.exp(), predict(scorer, rows, LinearizedPredictive()).exp(), atol=1e-5, rtol=0)
    given = AutoPredictive(stochastic_layers="last:2")
    given.chosen(scorer, rows)
    assert given.choice is not None and given.choice.name == "linearized, s in last:2"


def test_too_few_rows_are_given_to_particles_and_a_choice_is_kept_until_the_weights_change() -> None:
    model = model_with(0.02)
    scorer, rows = scorer_of(model), encoded()
    auto = AutoPredictive()
    for _ in range(2):
        assert isinstance(auto.chosen(scorer, rows[: TRIAL_ROWS - 1]), MonteCarloPredictive)
    assert auto.choice is not None and "too few" in auto.choice.sentence
    linear = auto.chosen(scorer, rows)
    assert isinstance(linear, LinearizedPredictive) and auto.chosen(scorer, rows[:1]) is linear
    with torch.no_grad():
        for leaf in stochastic_layers(model).values():
            leaf.posterior.log_std.fill_(1.5)
    assert isinstance(auto.chosen(scorer, rows), MonteCarloPredictive)


def test_a_backward_pass_that_does_not_fit_is_left_to_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is full cannot be had in a test: its error is raised where it would come from."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("scalabl.predictive.linearized.logit_jacobian", full)
    auto, scorer = AutoPredictive(), scorer_of(model_with(0.02))
    assert isinstance(auto.chosen(scorer, encoded()), MonteCarloPredictive)
    assert auto.choice is not None and "do not fit into memory" in auto.choice.sentence
    assert not scorer.model.training


def test_the_choice_does_not_depend_on_the_batch_nor_leave_anything_behind() -> None:
    model = model_with(0.3, last=2)
    sentences = []
    for size in (2, 12):
        auto = AutoPredictive()
        auto.chosen(scorer_of(model.train()), encoded(), batch_size=size)
        assert auto.choice is not None and model.training
        sentences.append(auto.choice.sentence.partition("off in probability")[2])
    assert sentences[0] == sentences[1] != ""
    assert all(leaf.state == "auto" for leaf in stochastic_layers(model).values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_reference_and_the_variance_are_those_of_independent_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40_000, 1, 1, generator=generator, dtype=torch.float64)

    def f(z: torch.Tensor) -> torch.Tensor:
        return 2 * z + z.square()  # Var = 4 + 2, mean = 1

    pairs = torch.stack([f(z), f(-z)], dim=1).flatten(0, 1)
    mean, variance = reference_and_variance(pairs)
    assert mean.item() == pytest.approx(1, abs=0.03) and variance.item() == pytest.approx(6, abs=0.15)
    # unbiased with few pairs too
    few = [reference_and_variance(part)[1].item() for part in pairs[:20_000].split(4)]
    assert sum(few) / len(few) == pytest.approx(6, abs=0.4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="samples is 0"):
        make_predictive("auto", samples=0)
    with pytest.raises(UserError, match="stochastic_layers is 'top'"):
        AutoPredictive(stochastic_layers="top")
    base, _ = loaded()
    from peft import LoraConfig

    plain = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="no posterior over s"):
        predict(scorer_of(plain), encoded(), AutoPredictive())
