"""Every method on a classification head: its particles are what its equation says, by Transformers' own pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from head_bases import body_of, own_probs
from tiny_base import tiny_encoder, write_texts
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.data.load import rows_of
from scalabl.methods.laplace import LinearizedLaplacePredictive
from scalabl.methods.last_layer_laplace import LastLayerPredictive, head_features
from scalabl.predictive import MeanPredictive, predict
from scalabl.predictive.head_features import head_layer
from scalabl.predictive.lora_particles import DropoutPredictive, WeightNoisePredictive, lora_matrices, lora_parts
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run, load_post_hoc
from scalabl.runs.registry import SAMPLED, TRAINED

N = 3
BASELINES = [name for name in TRAINED if name != "scalabl"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def on_head(trained: Callable[..., Path], texts: Path) -> Callable[..., Path]:
    """method and settings -> the directory of a finished run of a few steps on a tiny encoder."""

    def make(method: str, **changes: object) -> Path:
        own = {"scoring": "auto", "normalization": "auto", "steps": 6, "learning_rate": 0.02, "data": str(texts)}
        return trained(method, **own | {"model": str(tiny_encoder())} | changes)

    return make


@pytest.fixture(scope="module")
def rows(texts: Path) -> list[Example]:
    return rows_of(str(texts), limit=6)


def log_probs(run: Run, strategy: object, rows: list[Example], batch_size: int = 8) -> Tensor:
    return predict(run.scorer, run.encode(rows), strategy, batch_size=batch_size)  # type: ignore[arg-type]


def own(run: Run, rows: list[Example]) -> Tensor:
    return own_probs(run.scorer.model, [row.question for row in rows])


@contextmanager
def at_particle(run: Run, strategy: object, number: int) -> Iterator[None]:
    """The weights themselves at a particle of noise or of masks."""
    matrices = lora_matrices(run.scorer.model)
    before = {name: module.weight.detach().clone() for name, module in matrices.items()}
    with torch.no_grad():
        if isinstance(strategy, DropoutPredictive):
            for name, masks in strategy.masks(run.scorer.model).items():
                matrices[f"{name}.lora_A"].weight.mul_(masks[number])
        else:
            assert isinstance(strategy, WeightNoisePredictive)
            for name, noise in strategy.noise(run.scorer.model).items():
                matrices[name].weight.add_(noise[number])
    yield
    with torch.no_grad():
        for name, weight in before.items():
            matrices[name].weight.copy_(weight)


def require_particles(run: Run, strategy: object, rows: list[Example]) -> None:
    drawn = log_probs(run, strategy, rows)
    assert drawn.shape == (N, len(rows), 3) and drawn.std(dim=0).max() > 1e-4
    torch.testing.assert_close(log_probs(run, strategy, rows, batch_size=1), drawn, atol=1e-4, rtol=0)
    with at_particle(run, strategy, 1):
        torch.testing.assert_close(drawn[1].exp(), own(run, rows), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", BASELINES)
def test_a_trained_baseline(method: str, on_head: Callable[..., Path], rows: list[Example]) -> None:
    if method == "ivon":
        pytest.importorskip("ivon")
    run = load_run(on_head(method))
    mean = log_probs(run, MeanPredictive(), rows)[0].exp()
    torch.testing.assert_close(mean, own(run, rows), atol=1e-4, rtol=0)
    head = [p for name, p in run.scorer.model.named_parameters() if "classifier.modules_to_save" in name]
    fresh = load_run(on_head(method, steps=1, learning_rate=1e-12, warmup=0.0))
    first = [p for name, p in fresh.scorer.model.named_parameters() if "classifier.modules_to_save" in name]
    assert head and (head[0] - first[0]).abs().max() > 1e-4  # it is trained
    if method in SAMPLED:
        require_particles(run, run.predictive(samples=N, seed=2), rows)
    else:
        torch.testing.assert_close(log_probs(run, run.predictive(samples=N), rows)[0].exp(), mean)


@pytest.fixture
def mle(on_head: Callable[..., Path]) -> Run:
    return load_run(on_head("mle"))


def test_a_temperature_is_on_the_heads_logits(mle: Run, rows: list[Example], texts: Path) -> None:
    module = load_post_hoc("temperature")
    found = module.fit(mle, [], rows_of(str(texts), split="validation"))["temperature"]
    expected = own(mle, rows).log().div(found).softmax(-1)
    torch.testing.assert_close(log_probs(mle, module.predictive(mle), rows)[0].exp(), expected, atol=1e-4, rtol=0)


def test_tfb_has_its_noise_on_a(mle: Run, rows: list[Example], texts: Path) -> None:
    module = load_post_hoc("tfb")
    module.fit(mle, rows_of(str(texts), split="train"), [])
    require_particles(mle, module.predictive(mle, samples=N, seed=1), rows)


def test_the_members_of_an_ensemble_have_their_own_heads(on_head: Callable[..., Path], rows: list[Example]) -> None:
    directories = [on_head("mle", seed=seed) for seed in (1, 2)]
    run, module = load_run(directories[0]), load_post_hoc("ensemble")
    module.fit(run, [], [], members=directories[1:])
    members = log_probs(run, module.predictive(run), rows)
    for found, directory in zip(members, directories, strict=True):
        torch.testing.assert_close(found.exp(), own(load_run(directory), rows), atol=1e-4, rtol=0)
    assert (members[0] - members[1]).abs().max() > 1e-2


def test_laplace_pushes_the_gaussian_of_a_and_b_forward_to_the_heads_logits(
    mle: Run, rows: list[Example], texts: Path
) -> None:
    module = load_post_hoc("laplace")
    module.fit(mle, rows_of(str(texts), split="train"), [])
    strategy = module.predictive(mle)
    assert isinstance(strategy, LinearizedLaplacePredictive)
    batch = mle.scorer.scoring.collate(mle.encode(rows[:2]))
    mean, covariance = strategy.logit_distribution(mle.scorer, batch)
    torch.testing.assert_close(mean.softmax(-1), own(mle, rows[:2]), atol=1e-4, rtol=0)
    expected = torch.zeros_like(covariance)
    for name, matrix in lora_matrices(mle.scorer.model).items():
        matrix.weight.requires_grad_(True)
        for row in range(2):
            logits = mle.scorer.class_logits(batch)[row]
            jacobian = torch.stack(
                [torch.autograd.grad(logits[c], matrix.weight, retain_graph=True)[0] for c in range(3)]
            )
            block = strategy.blocks[name]
            expected[row] += block.logit_covariances(jacobian[None], [strategy.precision])[0, 0]
        matrix.weight.requires_grad_(False)
    torch.testing.assert_close(covariance, expected, rtol=1e-3, atol=1e-6)
    # a head may have more labels than a question has choices
    wide = torch.randn(2, 30), torch.eye(30).expand(2, -1, -1)
    strategy.logit_distribution = lambda *_: wide  # type: ignore[method-assign, assignment]
    drawn = strategy(mle.scorer, batch)
    assert drawn.shape == (1000, 2, 30)
    torch.testing.assert_close(drawn.exp().sum(-1), torch.ones(1000, 2))
    torch.testing.assert_close((drawn - drawn[:, :, :1]).std(0)[:, 1:], torch.full((2, 29), 2**0.5), atol=0.2, rtol=0)


def test_subspace_laplace_is_around_the_mean_and_leaves_the_run_as_it_was(
    mle: Run, rows: list[Example], texts: Path
) -> None:
    module = load_post_hoc("subspace_laplace")
    before = own(mle, rows)
    module.fit(mle, rows_of(str(texts), split="train"), [])
    drawn = log_probs(mle, module.predictive(mle), rows)
    torch.testing.assert_close(log_probs(mle, module.predictive(mle), rows, batch_size=1), drawn, atol=1e-3, rtol=0)
    assert drawn.std(dim=0).max() > 1e-3
    torch.testing.assert_close(own(mle, rows), before)


def test_projections_of_positions_carry_no_particles(on_head: Callable[..., Path], rows: list[Example],
                                                     tmp_path: Path) -> None:  # fmt: skip
    """DeBERTa's query and key projections see relative positions too, which no row has for itself."""
    body = body_of("deberta-v2", tmp_path / "body")
    run = load_run(
        on_head("mc_dropout", model=str(body), lora_dropout=0.4, target_modules="all-linear", max_length=100)
    )
    names = list(lora_parts(run.scorer.model))
    assert any(name.endswith("value_proj") for name in names)
    assert not any(name.endswith(("query_proj", "key_proj")) for name in names)
    require_particles(run, run.predictive(samples=N, seed=2), rows)


def test_last_layer_laplace_is_a_gaussian_on_the_heads_weights(
    on_head: Callable[..., Path], texts: Path, rows: list[Example]
) -> None:
    directory = on_head("mle", seed=4)
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    run, module = load_run(directory), load_post_hoc("last_layer_laplace")
    train = rows_of(str(texts), split="train")
    facts = module.fit(run, train, [], batch_size=4)
    strategy = module.predictive(run, samples=N, seed=2)
    assert isinstance(strategy, LastLayerPredictive) and strategy.samples == 32

    def passed(some: list[Example]) -> tuple[Tensor, Tensor]:
        """Transformers' own logits, and what the classifier reads, with a 1 behind."""
        read: list[Tensor] = []
        layer = head_layer(run.scorer.model)
        assert layer is not None
        handle = layer.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0]))
        probs = own(run, some)
        handle.remove()
        features = torch.cat(read)
        return probs, torch.cat([features, torch.ones(len(features), 1)], dim=1)

    probs, features = passed(train)
    out = torch.diag(probs.sum(dim=0)) - probs.T @ probs
    curvature = torch.kron(out.double(), (features.T @ features / len(train)).double())
    probs, features = passed(rows)
    size, classes = features.shape[1], probs.shape[1]
    covariance = (curvature + facts["prior_precision"] * torch.eye(size * classes)).inverse()
    turned = strategy.block.out_vectors
    for h, variances in zip(features, strategy.variances(features), strict=True):
        jacobian = torch.kron(torch.eye(classes), h).double()
        expected = (jacobian @ covariance @ jacobian.T).float()
        torch.testing.assert_close(turned @ variances.diag() @ turned.T, expected, rtol=1e-3, atol=1e-5)
    # without noise it is the run's own prediction, and its draws differ and average to about it
    still = log_probs(run, LastLayerPredictive(strategy.block, 1e12, samples=2), rows)
    torch.testing.assert_close(still.exp(), probs.expand(2, -1, -1), atol=1e-4, rtol=0)
    drawn = log_probs(run, strategy, rows)
    assert drawn.shape == (32, len(rows), classes) and drawn.exp().std(dim=0).max() > 1e-4
    fresh = load_run(directory)
    torch.testing.assert_close(
        log_probs(fresh, module.predictive(fresh, samples=N, seed=2), rows, batch_size=2), drawn, atol=1e-5, rtol=0
    )
    assert before == {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("method", "as_answered", "is_narrower"),  # answers as the head has them, or those that it holds least likely
    [
        ("last_layer_laplace", True, True),
        ("laplace", True, True),
        ("laplace", False, False),
        ("subspace_laplace", False, True),
    ],
)
def test_laplace_takes_the_precision_that_validation_rows_like_best(
    on_head: Callable[..., Path],
    texts: Path,
    method: str,
    as_answered: bool,
    is_narrower: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, module = load_run(on_head("mle", seed=5)), load_post_hoc(method)
    train, held_out = rows_of(str(texts), split="train"), rows_of(str(texts), split="validation")
    ranked = log_probs(run, MeanPredictive(), held_out)[0].sort(dim=1, descending=as_answered).indices
    answers = ranked[:, 0]
    held_out = [replace(row, answer=int(answer)) for row, answer in zip(held_out, answers, strict=True)]
    evidence = module.fit(run, train, [])["prior_precision"]
    chosen = module.fit(run, train, held_out)["prior_precision"]
    assert chosen > evidence if is_narrower else chosen == evidence

    nll = {}
    for times in (1, 10, 1e2, 1e3, 1e4, 1e5, 1e6):
        precision = min(evidence * times, 1e4)
        monkeypatch.setattr("scalabl.training.posthoc.precision.TRIED", (precision / evidence,))
        assert module.fit(run, train, held_out)["prior_precision"] == pytest.approx(precision)
        averaged = log_probs(run, module.predictive(run, samples=1), held_out).exp().mean(dim=0)
        nll[precision] = torch.nn.functional.nll_loss(averaged.log(), answers).item()
    assert len(set(nll.values())) > 1
    assert nll[chosen] == pytest.approx(min(nll.values()), abs=1e-6), nll


def test_last_layer_laplace_reads_the_one_position_of_a_decoders_head(
    trained: Callable[..., Path], texts: Path, rows: list[Example]
) -> None:
    own_settings = {"scoring": "head", "normalization": "auto", "steps": 4, "learning_rate": 0.02, "data": str(texts)}
    run, module = load_run(trained("mle", **own_settings)), load_post_hoc("last_layer_laplace")
    module.fit(run, rows_of(str(texts), split="train"), [])
    strategy = module.predictive(run)
    assert isinstance(strategy, LastLayerPredictive)
    still = log_probs(run, LastLayerPredictive(strategy.block, 1e12, samples=1), rows, batch_size=3)
    torch.testing.assert_close(still, log_probs(run, MeanPredictive(), rows), atol=1e-4, rtol=0)
    layer = head_layer(run.scorer.model)
    assert layer is not None and layer.bias is None
    batch = run.scorer.scoring.collate(run.encode(rows))
    logits, features = head_features(run.scorer, batch)
    assert features.shape == (len(rows), layer.in_features)
    torch.testing.assert_close(features @ layer.weight.T, logits, atol=1e-5, rtol=0)


def test_last_layer_laplace_needs_a_head(trained: Callable[..., Path], train_rows: list[Example]) -> None:
    with pytest.raises(UserError, match="is of a classification head, which this run has not; fit subspace_laplace"):
        load_post_hoc("last_layer_laplace").fit(load_run(trained("mle")), train_rows, [])
