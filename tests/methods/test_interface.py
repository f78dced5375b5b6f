"""Every method trains or is fitted, saves, loads and predicts through the one interface."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.methods.saved import SavedMethod
from scalabl.predictive import MeanPredictive, Predictive, predict
from scalabl.runs.loading import load_run
from scalabl.runs.method import PostHocMethod, Run, TrainedMethod, load_method, load_post_hoc
from scalabl.runs.registry import METHODS, POST_HOC, SAMPLED, TRAINED
from scalabl.runs.settings import Settings, make_settings

N = 4


@dataclass(frozen=True)
class Row:
    """A method in the matrix of these tests.

    Attributes:
        method: its name.
        particles: (particles, B, C) is what it predicts with N samples.
        nothing: settings with which it would be another method, and what the refusal says.
        needs: a package that is not of this project's own.
        refits: post-hoc, fitted on the training rows of a plain LoRA; refuses other runs, and no rows.
        members: post-hoc, fitted on runs of other seeds.
        head: of a classification head alone: tests/methods/test_heads.py has what is tested here of the others.
    """

    method: str
    particles: int = 1
    nothing: tuple[dict[str, float], str] | None = None
    needs: str | None = None
    refits: bool = False
    members: bool = False
    head: bool = False


MATRIX = [
    Row("scalabl", N),
    Row("mle"),
    Row("map", nothing=({"weight_decay": 0.0}, "weight_decay is 0")),
    Row("mc_dropout", N, nothing=({"lora_dropout": 0.0}, "lora_dropout is 0")),
    Row("blob", N),
    Row("monteclora"),
    Row("ivon", N, nothing=({"beta": 0.0}, "beta is 0"), needs="ivon"),
    Row("temperature"),
    Row("ensemble", 2, members=True),
    Row("laplace", 1000, refits=True),
    Row("tfb", N, refits=True),
    Row("last_layer_laplace", 32, refits=True, head=True),
    Row("subspace_laplace", 128, refits=True),  # draws of its linearised logits
]


def rows_of(*methods: str, **wanted: bool) -> Any:
    """Parametrised by the rows of these methods that have what is wanted."""
    rows = [r for r in MATRIX if r.method in methods and all(bool(getattr(r, k)) == v for k, v in wanted.items())]
    return pytest.mark.parametrize("row", rows, ids=[row.method for row in rows])


@pytest.fixture(autouse=True)
def _package(request: pytest.FixtureRequest) -> None:
    row = request.node.callspec.params.get("row") if hasattr(request.node, "callspec") else None
    if row is not None and row.needs:
        pytest.importorskip(row.needs)


def log_probs(run: Run, predictive: Predictive, rows: list[Example], batch_size: int = 8) -> torch.Tensor:
    return predict(run.scorer, run.encode(rows), predictive, batch_size=batch_size)


@rows_of(*TRAINED)
def test_a_trained_method_saves_loads_and_predicts(
    row: Row, trained: Callable[..., Path], test_rows: list[Example]
) -> None:
    directory = trained(row.method)
    first, again = load_run(directory), load_run(directory)
    own = log_probs(first, load_method(row.method).predictive(first, samples=N, seed=3), test_rows)
    assert own.shape == (row.particles, len(test_rows), 5)
    for i, example in enumerate(test_rows):
        assert (own[:, i, len(example.choices) :] == -torch.inf).all()
        torch.testing.assert_close(own[:, i].exp().sum(-1), torch.ones(len(own)))
    # the same numbers from a fresh load, whatever stands beside a row
    other = log_probs(again, again.predictive(samples=N, seed=3), test_rows, batch_size=3)
    torch.testing.assert_close(own, other, atol=2e-5, rtol=0)


@rows_of(*(method for method in TRAINED if method in SAMPLED))
def test_particles_are_fixed_by_their_seed_and_differ_from_each_other(
    row: Row, trained: Callable[..., Path], test_rows: list[Example]
) -> None:
    run = load_run(trained(row.method))
    four = run.predictive(samples=4, seed=1)
    four.chunk = 4  # type: ignore[attr-defined]
    drawn = log_probs(run, four, test_rows)
    for chunk in (1, 3):
        cut = run.predictive(samples=4, seed=1)
        cut.chunk = chunk  # type: ignore[attr-defined]
        torch.testing.assert_close(log_probs(run, cut, test_rows), drawn, atol=2e-5, rtol=0)
    more = log_probs(run, run.predictive(samples=6, seed=1), test_rows)
    torch.testing.assert_close(more[:4], drawn, atol=2e-5, rtol=0)
    spread = drawn.exp().std(dim=0)
    assert (spread.nan_to_num().amax(-1) > 1e-6).all()
    mean = log_probs(run, MeanPredictive(), test_rows)
    torch.testing.assert_close(log_probs(run, run.predictive(samples=0), test_rows), mean, atol=1e-6, rtol=0)
    other = log_probs(run, run.predictive(samples=4, seed=2), test_rows)
    assert (other.exp() - drawn.exp()).abs().max() > 1e-6


def test_no_method_is_missing_or_has_another_signature() -> None:
    assert [row.method for row in MATRIX] == list(METHODS) == [*TRAINED, *POST_HOC]
    assert {row.method for row in MATRIX if row.particles == N} == set(SAMPLED)
    for name in METHODS:
        method = load_method(name) if name in TRAINED else load_post_hoc(name)
        assert method.name == name and method.traits.title and inspect.getdoc(method)
        assert isinstance(method, TrainedMethod if name in TRAINED else PostHocMethod)
        signature = inspect.signature(method.predictive)
        assert list(signature.parameters)[:3] == ["run", "samples", "seed"]


def test_methods_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(UserError, match="not trained but fitted"):
        load_method("tfb")
    with pytest.raises(UserError, match="training run of its own"):
        load_post_hoc("mle")
    for load in (load_method, load_post_hoc):
        with pytest.raises(UserError, match="no method 'sgld'"):
            load("sgld")
    with pytest.raises(UserError, match="method is 'tfb'"):
        make_settings({"method": "tfb"})


def test_a_methods_own_settings_hold_unless_others_are_given() -> None:
    for method in TRAINED:
        settings = METHODS[method].settings
        flat = make_settings({"method": method}).as_dict()
        assert {name: flat[name] for name in settings} == settings
    assert make_settings({"method": "map", "weight_decay": 0.1}).optimisation.weight_decay == 0.1
    assert make_settings({"method": "mle"}) == Settings.flat(method="mle")


@rows_of(*TRAINED, nothing=True)
def test_a_method_that_would_be_mle_is_refused(row: Row, mle: Run) -> None:
    assert row.nothing is not None
    settings = make_settings({"method": row.method} | row.nothing[0])
    with pytest.raises(UserError, match=row.nothing[1]):
        load_method(row.method).adapter_config(settings, mle.scorer.model)


def test_weight_decay_shrinks_both_a_and_b(trained: Callable[..., Path]) -> None:
    """A strong decay is seen in A and in B; MAP differs from MLE in nothing else."""
    from safetensors.torch import load_file

    plain = load_file(trained("mle") / "adapter_model.safetensors")
    decayed = load_file(trained("map", weight_decay=5.0) / "adapter_model.safetensors")
    for part in ("lora_A", "lora_B"):
        norms = [sum(t.norm() for n, t in tensors.items() if part in n) for tensors in (decayed, plain)]
        assert norms[0] < 0.9 * norms[1]
    usual = load_file(trained("map") / "adapter_model.safetensors")
    assert any(not torch.equal(usual[name], plain[name]) for name in plain)


@rows_of(*POST_HOC, head=False)
def test_a_post_hoc_method_saves_beside_the_adapter_and_predicts_the_same_after_loading(
    row: Row,
    trained: Callable[..., Path],
    train_rows: list[Example],
    validation_rows: list[Example],
    test_rows: list[Example],
) -> None:
    directory, method, members = trained("mle", seed=5), row.method, [trained("mle")] if row.members else []
    before = {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}
    run, module = load_run(directory), load_post_hoc(method)
    with pytest.raises(UserError, match=f"{method} was not fitted"):
        module.predictive(run)
    facts = module.fit(run, train_rows, validation_rows, members=members)
    assert (directory / "posthoc" / method / f"{method}.json").is_file()
    assert facts["adapter_sha256"] == run.record.adapter_sha256
    one = log_probs(run, module.predictive(run, samples=N, seed=2), test_rows)
    assert one.shape == (row.particles, len(test_rows), 5)
    fresh = load_run(directory)
    other = log_probs(fresh, module.predictive(fresh, samples=N, seed=2), test_rows, batch_size=3)
    torch.testing.assert_close(one, other, atol=5e-5, rtol=0)
    torch.testing.assert_close(one.exp().sum(-1), torch.ones(one.shape[:2]))
    # the adapter is as it was, and the run still predicts as it did
    assert before == {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}
    mean = log_probs(load_run(directory), MeanPredictive(), test_rows)
    torch.testing.assert_close(log_probs(run, MeanPredictive(), test_rows), mean, atol=1e-6, rtol=0)


def test_what_was_fitted_on_another_adapter_is_refused(
    trained: Callable[..., Path], validation_rows: list[Example]
) -> None:
    run, module = load_run(trained("mle", seed=6)), load_post_hoc("temperature")
    answers = log_probs(run, run.predictive(), validation_rows)[0].argmax(-1).tolist()
    right = [replace(row, answer=answer) for row, answer in zip(validation_rows, answers, strict=True)]
    assert module.fit(run, [], right)["temperature"] == 1  # surer would be better without an end
    module.fit(run, [], validation_rows)
    run.record = replace(run.record, adapter_sha256="0" * 64)
    with pytest.raises(UserError, match="another adapter"):
        module.predictive(run)
    assert run.directory is not None
    file = run.directory / "posthoc" / "temperature" / "temperature.json"
    for text, sentence in (('{"t', "is not readable JSON .*; fit temperature"), ("[]", "; fit temperature again")):
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            module.predictive(run)


def test_half_a_second_fit_is_no_fit(
    trained: Callable[..., Path], validation_rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, module = load_run(trained("mle", seed=6)), load_post_hoc("temperature")
    assert isinstance(module, SavedMethod)
    module.fit(run, [], validation_rows)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="killed"):
        patched.setattr("scalabl.methods.saved.save_file", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        module.save(run, {}, {"new": torch.zeros(1)})
    with pytest.raises(UserError, match="temperature was not fitted"):
        module.predictive(run)


@rows_of(*POST_HOC, refits=True)
def test_a_run_with_a_posterior_of_its_own_is_refused(
    row: Row, trained: Callable[..., Path], train_rows: list[Example]
) -> None:
    run, method = load_run(trained("scalabl")), row.method
    with pytest.raises(UserError, match="trained by scalabl"):
        load_post_hoc(method).fit(run, train_rows, [])
    with pytest.raises(UserError, match="training rows"):
        load_post_hoc(method).fit(load_run(trained("mle")), [], [])


def test_a_temperature_composes_with_a_sampled_method(
    trained: Callable[..., Path], validation_rows: list[Example], test_rows: list[Example]
) -> None:
    run, module = load_run(trained("mc_dropout")), load_post_hoc("temperature")
    temperature = module.fit(run, [], validation_rows, seed=1)["temperature"]
    raw = log_probs(run, run.predictive(samples=N, seed=1), test_rows)
    tempered = log_probs(run, module.predictive(run, samples=N, seed=1), test_rows)
    torch.testing.assert_close(tempered, (raw / temperature).log_softmax(-1), atol=1e-5, rtol=0)
    assert torch.equal(tempered.argmax(-1), raw.argmax(-1))
