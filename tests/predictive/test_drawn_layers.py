"""Particles and linearisations of the top layers alone: what lies below is run once, and no answer changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_base import ARCHITECTURES, adapted, loaded, questions
from torch import Tensor, nn

import scalabl
from scalabl.core.errors import UserError
from scalabl.posterior.joint import JointGaussian
from scalabl.predictive import LinearizedPredictive, MeanPredictive, MonteCarloPredictive, Predictive, predict
from scalabl.predictive.adaptive import AdaptivePredictive, with_sampling
from scalabl.predictive.linearized import logit_gaussian, logit_jacobian
from scalabl.predictive.sampling import Sampling
from scalabl.scoring import Continuation, Encoded, Letters, Scorer
from scalabl.scoring.trunk import Trunk
from scalabl.tuner import StochasticProjection, stochastic_layers
from scalabl.tuner.joint import set_joint
from scalabl.tuner.state import only


def rows_of(number: int = 5, letters: bool = False) -> tuple[Any, list[Encoded]]:
    _, tokenizer = loaded()
    scoring = Letters(tokenizer) if letters else Continuation(tokenizer)
    return scoring, [scoring.encode(row) for row in questions(number)]


def both(model: PeftModel, make: Callable[[], Predictive], *, letters: bool = False) -> tuple[Tensor, Tensor]:
    """Probabilities with every layer run for every particle, and with the lower ones run once."""
    scoring, rows = rows_of(letters=letters)
    whole = predict(Scorer(model, scoring), rows, make(), batch_size=2)
    staged = predict(Scorer(model, scoring, Trunk(model)), rows, make(), batch_size=2)
    return whole.exp(), staged.exp()


@pytest.mark.parametrize("spec", ["last:1", "last:2", "last:3", None])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_running_the_lower_layers_once_changes_no_answer(architecture: str, spec: str | None) -> None:
    for last in (None, 2):
        if last == 2 and spec == "last:3":
            continue
        model = adapted(architecture, last=last)
        for make in (
            lambda: MonteCarloPredictive(4, seed=1, stochastic_layers=spec),
            lambda: LinearizedPredictive(16, stochastic_layers=spec),
        ):
            whole, staged = both(model, make)
            torch.testing.assert_close(staged, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [{"stochastic_layers": "last:1"}, {"stochastic_layers": "last:2"}])
def test_an_adapter_whose_lower_layers_are_plain(config: dict[str, Any]) -> None:
    model = adapted(**config)
    for letters in (False, True):
        for make in (lambda: MonteCarloPredictive(4), lambda: LinearizedPredictive(16)):
            whole, staged = both(model, make, letters=letters)
            torch.testing.assert_close(staged, whole, atol=1e-5, rtol=1e-5)


def test_an_output_layer_alone() -> None:
    model = adapted(target_modules=["q_proj", "lm_head"])
    for make in (
        lambda: MonteCarloPredictive(4, stochastic_layers="last:1"),
        lambda: LinearizedPredictive(16, stochastic_layers="last:1"),
    ):
        whole, staged = both(model, make)
        torch.testing.assert_close(staged, whole, atol=1e-5, rtol=1e-5)
        assert (staged.std(dim=0) > 1e-4).any()


def rows_through(model: PeftModel, run: Callable[[], object]) -> list[int]:
    """How many rows went through each decoder layer."""
    counts = [0] * 3
    layers = list(model.get_base_model().model.layers)

    def count(number: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
            counts[number] += len(args[0])

        return hook

    handles = [layer.register_forward_hook(count(i)) for i, layer in enumerate(layers)]
    run()
    for handle in handles:
        handle.remove()
    return counts


def test_the_lower_layers_see_every_row_once_and_the_upper_ones_every_particle() -> None:
    model = adapted()
    scoring, rows = rows_of(4)
    scorer = Scorer(model, scoring, Trunk(model))
    for spec, expected in (("last:1", [4, 4, 40]), ("last:2", [4, 40, 40]), (None, [40, 40, 40])):
        predictive = MonteCarloPredictive(10, stochastic_layers=spec)
        predict(scorer, rows, predictive)  # the architecture is checked once
        assert rows_through(model, lambda p=predictive: predict(scorer, rows, p)) == expected  # type: ignore[misc]
    adaptive = AdaptivePredictive(MonteCarloPredictive(8, stochastic_layers="last:1"), 1.0)
    assert rows_through(model, lambda: predict(scorer, rows, adaptive)) == [4, 4, 32]


def test_the_backward_passes_of_the_linearisation_stop_at_the_lowest_drawn_layer() -> None:
    model = adapted()
    scoring, rows = rows_of(4)
    scorer = Scorer(model, scoring, Trunk(model))
    batch = scoring.collate(rows)
    _, all_layers = logit_jacobian(scorer, batch)
    passed: list[int] = []
    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.mlp.down_proj.register_full_backward_hook(lambda *_, number=number: passed.append(number))
    _, last = logit_jacobian(scorer, batch, "last:1")
    assert set(passed) == {2}
    assert set(last) == {name for name in all_layers if ".2." in name}
    for name, jacobian in last.items():
        torch.testing.assert_close(jacobian, all_layers[name], atol=1e-5, rtol=1e-4)


def test_the_other_layers_carry_their_mean() -> None:
    # the same as an adapter whose lower sigmas are nothing
    model, certain = adapted(), adapted()
    with torch.no_grad():
        for name, leaf in stochastic_layers(certain).items():
            if ".2." not in name:
                leaf.posterior.log_std.fill_(-30.0)
    scoring, rows = rows_of()
    for restricted, everywhere in (
        (MonteCarloPredictive(4, stochastic_layers="last:1"), MonteCarloPredictive(4)),
        (
            MonteCarloPredictive(4, draws="antithetic", stochastic_layers="last:1"),
            MonteCarloPredictive(4, draws="antithetic"),
        ),
        (LinearizedPredictive(16, stochastic_layers="last:0.3"), LinearizedPredictive(16)),
    ):
        found = predict(Scorer(model, scoring, Trunk(model)), rows, restricted).exp()
        expected = predict(Scorer(certain, scoring), rows, everywhere).exp()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (found - predict(Scorer(model, scoring), rows, everywhere).exp()).abs().max() > 1e-3
    assert all(leaf.state == "auto" for leaf in stochastic_layers(model).values())


def test_all_layers_by_number_are_all_layers() -> None:
    model = adapted()
    scoring, rows = rows_of()
    scorer = Scorer(model, scoring, Trunk(model))
    for spec in ("last:3", "last:1.0"):
        found = predict(scorer, rows, MonteCarloPredictive(4, stochastic_layers=spec))
        assert torch.equal(found, predict(scorer, rows, MonteCarloPredictive(4)))


def test_a_joint_covariance_is_marginalised() -> None:
    model = adapted(covariance="full")
    ranks = {name: leaf.out_features for name, leaf in stochastic_layers(model).items()}
    size = sum(ranks.values())
    generator = torch.Generator().manual_seed(4)
    factor = 0.1 * torch.randn(size, size, generator=generator).tril() + 0.3 * torch.eye(size)
    set_joint(model, JointGaussian(factor, ranks))
    scoring, rows = rows_of(3)
    batch = scoring.collate(rows)
    scorer = Scorer(model, scoring, Trunk(model))
    _, covariance = logit_gaussian(scorer, batch, "last:1")
    _, jacobians = logit_jacobian(scorer, batch, "last:1")
    kept = torch.cat([torch.full((r,), ".2." in name) for name, r in ranks.items()])
    block = (factor @ factor.T)[kept][:, kept]
    jacobian = torch.cat([jacobians[name] for name in ranks if ".2." in name], dim=-1)
    torch.testing.assert_close(covariance, jacobian @ block @ jacobian.transpose(1, 2), atol=1e-5, rtol=1e-4)
    whole, staged = both(model, lambda: MonteCarloPredictive(4, stochastic_layers="last:2"))
    torch.testing.assert_close(staged, whole, atol=1e-5, rtol=1e-5)


def test_only_within_particles() -> None:
    model = adapted()
    names = [name for name in stochastic_layers(model) if ".1." in name]
    with scalabl.particles(model, 2), only(model, names):
        states = {name: leaf.state for name, leaf in stochastic_layers(model).items()}
    assert {name for name, state in states.items() if state != "mean"} == set(names)
    assert all(leaf.state == "auto" for leaf in model.modules() if isinstance(leaf, StochasticProjection))


def test_bad_specifications_are_refused_before_any_pass() -> None:
    for make in (MonteCarloPredictive, LinearizedPredictive):
        with pytest.raises(UserError, match="it must be last:K"):
            make(stochastic_layers="variance:0.9")
    scoring, rows = rows_of(2)
    model = adapted()
    with pytest.raises(UserError, match="'last:4', but s is uncertain in 3 layers at most"):
        predict(Scorer(model, scoring, Trunk(model)), rows, MonteCarloPredictive(2, stochastic_layers="last:4"))
    assert rows_through(model, lambda: None) == [0, 0, 0]


def test_other_draws_keep_the_layers() -> None:
    made = with_sampling(MonteCarloPredictive(4, stochastic_layers="last:1"), Sampling(draws="sobol"))
    assert isinstance(made, MonteCarloPredictive) and made.stochastic_layers == "last:1"


def test_an_architecture_that_cannot_resume_runs_every_layer() -> None:
    model = adapted()
    scoring, rows = rows_of(2)
    trunk = Trunk(model)
    encode = trunk.encode
    trunk.encode = lambda m, b, *a: encode(m, b, *a) * 1.5  # type: ignore[method-assign]
    scorer = Scorer(model, scoring, trunk)
    for predictive in (MonteCarloPredictive(2, stochastic_layers="last:1"), MonteCarloPredictive(2), MeanPredictive()):
        found = predict(scorer, rows, predictive)
        torch.testing.assert_close(found, predict(Scorer(model, scoring), rows, predictive))
