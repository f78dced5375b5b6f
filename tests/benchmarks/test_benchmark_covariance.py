"""The covariance study at toy size: on three runs of the tiny model, resumed, and against closed forms."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import covariance
import covariance_effects
import covariance_posterior
import pytest
import torch
from covariance import NULLS, cosine, fit_rows, learnt_rows, null_cosines, p_value
from covariance_effects import STRUCTURES, EveryStructure, paired_ood_difference
from covariance_posterior import (
    KINDS,
    Position,
    correlation_of,
    correlation_rows,
    loaded,
    off_diagonals,
    pairs,
    position,
    study_of,
)
from tiny_base import adapted, questions, tiny_base, write_task
from tiny_base import loaded as tiny

from scalabl.core.errors import UserError
from scalabl.metrics import Metric, ood_auroc
from scalabl.posterior.joint import JointGaussian
from scalabl.predictive import LinearizedPredictive
from scalabl.runs.method import load_post_hoc
from scalabl.runs.settings import DEFAULTS, Settings
from scalabl.scoring import Continuation, Scorer
from scalabl.training.posthoc.laplace import JointCurvature
from scalabl.training.run import train
from scalabl.tuner import stochastic_layers
from scalabl.tuner.joint import set_joint

TOY = ["--train-rows", "12", "--test-rows", "8", "--ood-rows", "5", "--points", "8", "--samples", "3", "--mc-rows", "4"]
TOY += ["--mc-ood-rows", "3", "--draws", "5", "--batches", "2", "--noise-batch", "3", "--start-steps", "2"]
TOY += ["--null", "60", "--bootstrap", "40"]
TABLES = ("posterior", "correlations", "divergences", "predictions", "learnt", "fit", "gradient_noise")
PICTURES = ("correlations", "sizes", "predictions", "learnt", "gradient_noise")
Call = Callable[..., None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs "mle", "diagonal" and "full" of one task, and another task's rows in "other"."""
    folder = tmp_path_factory.mktemp("covariance")
    settings: dict[str, Any] = {
        "model": str(tiny_base()), "data": str(write_task(folder / "task")), "steps": 6, "batch_size": 4, "r": 4,
        "layers": "last:2", "scoring": "continuation", "normalization": "token", "learning_rate": 0.05,
        "validation_rows": 4,
    }  # fmt: skip
    train(Settings.flat(method="mle", **settings), folder / "mle")
    for kind in ("diagonal", "full"):
        train(Settings.flat(covariance=kind, beta=0.5, init_sigma=0.3, **settings), folder / kind)
    write_task(folder / "other", test=7)
    return folder


@pytest.fixture
def line(runs: Path, tmp_path: Path, own_cache: Path) -> list[str]:
    named = [f"--{name}={runs / name}" for name in ("mle", "diagonal", "full")]
    places = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "results")]
    loaded.cache_clear()
    return ["covariance.py", *named, "--ood", str(runs / "other"), *places, *TOY]


@pytest.fixture
def call(line: list[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    def run(*options: str) -> None:
        monkeypatch.setattr("sys.argv", [*line, *options])
        covariance.main()

    return run


def table(tmp_path: Path, name: str) -> list[dict[str, str]]:
    with (tmp_path / "results" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_four_parts_are_written_and_a_second_start_computes_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(covariance_effects, "predict", killed)
        with pytest.raises(KeyboardInterrupt):
            call()
    assert {path.stem for path in results.glob("*.csv")} == {"posterior", "correlations", "divergences"}
    assert "# Correlations in the posterior of s" in (results / "README.md").read_text(encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(covariance_posterior, "gauss_newton", killed)
        call()
    assert {path.stem for path in results.glob("*.csv")} == set(TABLES)
    assert {path.stem for path in results.glob("*.svg")} == set(PICTURES)
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    page = before["README.md"].decode()
    for fact in (
        "- model: ",
        "12 training rows, 8 test rows",
        "- seeds: 0",
        "- versions: ",
        "- device: ",
        "- command: ",
    ):
        assert fact in page
    assert all(f"({name}.svg)" in page for name in PICTURES) and "nan" not in page
    with monkeypatch.context() as patch:
        for module, name in (
            (covariance_posterior, "gauss_newton"),
            (covariance_effects, "predict"),
            (covariance_effects, "s_gradients"),
            (covariance_effects, "train"),
        ):
            patch.setattr(module, name, killed)
        call()
        assert {path.name: path.read_bytes() for path in results.iterdir()} == before
        with pytest.raises(KeyboardInterrupt):  # another setting is another measurement
            call("--samples", "4", "--output", str(tmp_path / "other"))

    posterior = table(tmp_path, "posterior")
    assert [(row["weights"], row["prior"]) for row in posterior] == [
        ("mle", "evidence"), ("diagonal", "own"), ("diagonal", "evidence"), ("full", "own"), ("full", "evidence"),
    ]  # fmt: skip
    assert all(int(row["numbers"]) == 16 and 0 < float(row["effective_parameters"]) < 16 for row in posterior)
    for row in table(tmp_path, "divergences"):
        assert float(row["kl_p_q"]) > 0 and float(row["kl_q_p"]) > 0
        assert float(row["std_ratio"]) == pytest.approx(1) if row["kept"] == "marginal" else float(row["std_ratio"]) < 1
    rows = table(tmp_path, "predictions")
    assert len(rows) == 6 * 2 * 5 + 5 and {row["rows"] for row in rows if row["predictive"] == "mc"} == {"4"}
    assert {row["ood_rows"] for row in rows if row["metric"] == "ood_auroc_total"} == {"5", "3"}
    by = {(row["predictive"], row["structure"], row["kept"], row["metric"]): row for row in rows}
    for predictive in ("linearized", "mc"):
        joint = float(by[predictive, "joint", "marginal", "nll"]["value"])
        cut = by[predictive, "diagonal", "conditional", "nll"]
        assert float(cut["difference"]) == pytest.approx(float(cut["value"]) - joint) and cut["difference_low"]
        assert by[predictive, "joint", "marginal", "nll"]["difference"] == ""
    noise = table(tmp_path, "gradient_noise")
    assert len(noise) == 2 * 2 * 3 and {row["numbers"] for row in noise} == {"16", str(4 * 6)}
    for k in range(4):
        shares = sum(float(row["noise_share"]) for row in noise[3 * k : 3 * k + 3])
        assert shares == pytest.approx(1)


@pytest.fixture
def study(line: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("sys.argv", [*line, "--train-rows", "99"])
    return study_of(covariance.parse())


def test_the_exact_posterior_of_a_plain_lora_is_that_of_bayesianize(study: Any) -> None:
    run = study.run("mle")
    fitted = load_post_hoc("subspace_laplace").fit(run, study.train, [])
    joint, facts = position(study, "mle").exact("evidence")
    assert facts["effective_parameters"] == pytest.approx(fitted["effective_parameters"], rel=1e-4)
    assert facts["prior_std"] == pytest.approx(fitted["prior_precision"] ** -0.5, rel=1e-6)
    assert facts["log_likelihood"] == pytest.approx(fitted["log_likelihood"] / len(study.train), rel=1e-6)
    placed = load_post_hoc("subspace_laplace").predictive(run).leaves.joint  # type: ignore[attr-defined]
    torch.testing.assert_close(joint.covariance(), placed.covariance(), rtol=1e-3, atol=1e-5)


def test_the_exact_posterior_under_the_runs_own_prior_is_the_inverse_of_the_precision(study: Any) -> None:
    for name in ("diagonal", "full"):
        at = position(study, name)
        assert at.precision is not None
        of_prior = torch.full((16,), DEFAULTS["prior_std"] ** -2, dtype=torch.float64)
        torch.testing.assert_close(at.precision, of_prior)
        expected = torch.linalg.inv(at.curvature.matrix / 0.5 + of_prior.diag())
        relative = at.exact("own")[0].covariance()
        torch.testing.assert_close(torch.outer(at.mean, at.mean) * relative, expected, rtol=1e-4, atol=1e-6)
        leaves = stochastic_layers(study.run(name).scorer.model)
        assert at.learnt is not None
        for layer, factor in at.learnt.marginals.items():
            own = leaves[layer].posterior.covariance().detach()
            torch.testing.assert_close((factor @ factor.T).float(), own, rtol=1e-4, atol=1e-7)


def test_fewer_rows_are_scaled_up_to_the_runs(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [*line, "--train-rows", "6"])
    study = study_of(covariance.parse())
    at = position(study, "full")
    run = study.run("full")
    own = covariance_posterior.gauss_newton(run.scorer, run.encode(study.train))
    assert own.rows == 6 and at.curvature.rows == 24
    torch.testing.assert_close(at.curvature.matrix, 4 * own.matrix, rtol=1e-3, atol=1e-5)
    assert at.curvature.log_likelihood == pytest.approx(4 * own.log_likelihood, rel=1e-5)


def test_one_jacobian_serves_all_structures() -> None:
    scorer = Scorer(adapted(covariance="full"), Continuation(tiny()[1]))
    ranks = {name: leaf.out_features for name, leaf in stochastic_layers(scorer.model).items()}
    joint = some_joint(ranks)
    batch = scorer.scoring.collate([scorer.scoring.encode(row) for row in questions(5)])
    joints = [joint.restricted(*structure) for structure in STRUCTURES]  # type: ignore[arg-type]
    together = EveryStructure(joints, 16, seed=3)(scorer, batch)
    with torch.no_grad():
        torch.testing.assert_close(together[0], scorer.class_log_probs(batch))
    for k, one in enumerate(joints):
        set_joint(scorer.model, one)
        alone = LinearizedPredictive(16, seed=3)(scorer, batch)
        torch.testing.assert_close(together[1 + 16 * k : 17 + 16 * k], alone)
    assert (together[1:17] - together[-16:]).nan_to_num().abs().max() > 0.01


def some_joint(ranks: dict[str, int], *, seed: int = 0) -> JointGaussian:
    size = sum(ranks.values())
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return JointGaussian(torch.linalg.cholesky(0.02 * root @ root.T / size).float(), ranks)


def test_correlations_are_covariances_of_unit_variance() -> None:
    p = some_joint({"a": 3, "b": 6})
    std = p.covariance().diagonal().sqrt()
    torch.testing.assert_close(correlation_of(p) * torch.outer(std, std), p.covariance())
    scale = torch.tensor([30.0, 0.01])
    pair = torch.outer(scale, scale) * torch.tensor([[1, 0.8], [0.8, 1]])
    known = JointGaussian(torch.linalg.cholesky(pair.double()).float(), {"a": 2})
    assert correlation_of(known)[0, 1].item() == pytest.approx(0.8, rel=1e-5)
    assert torch.equal(correlation_of(p).diagonal(), torch.ones(9, dtype=torch.float64))


def test_paired_ood_difference_is_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    known, shifted = torch.randn(150, generator=generator), 0.7 + torch.randn(120, generator=generator)
    # a monotone map changes no rank: the difference and every resample's are zero, though each area is uncertain
    assert paired_ood_difference((known, shifted), (known.exp(), shifted.exp())) == Metric(0.0, 0.0, 0.0)
    alone = ood_auroc(known, shifted)
    noisy = [score + 0.3 * torch.randn(len(score), generator=generator) for score in (known, shifted)]
    gap = paired_ood_difference((known, shifted), (noisy[0], noisy[1]))
    assert gap.value == pytest.approx(alone.value - ood_auroc(*noisy).value)  # type: ignore[operator]
    assert gap.high - gap.low < 0.5 * (alone.high - alone.low)  # type: ignore[operator]
    with pytest.raises(UserError, match="other numbers of rows"):
        paired_ood_difference((known, shifted), (known[1:], shifted))


def test_the_null_tells_learnt_correlations_from_chance() -> None:
    exact = [correlation_of(some_joint({"a": 6}, seed=seed)) for seed in range(5)]
    other = [correlation_of(some_joint({"a": 6}, seed=10 + seed)) for seed in range(5)]
    assert cosine(exact, exact) == pytest.approx(1) and cosine([torch.eye(6)], [torch.eye(6)]) == 0
    flat = torch.cat([off_diagonals(x) for x in exact]), torch.cat([off_diagonals(x) for x in other])
    assert cosine(exact, other) == pytest.approx(torch.cosine_similarity(*flat, dim=0).item())
    for null in NULLS:
        values = null_cosines(exact, exact, null, 300, seed=1)
        assert values.shape == (300,) and p_value(1.0, values) == pytest.approx(1 / 301)
        assert abs(values.mean().item()) < 0.1 and 0.02 < p_value(cosine(other, exact), values) < 0.98
    assert p_value(0.5, torch.tensor([0.1, 0.5, 0.9])) == pytest.approx(3 / 4)


def _at(matrix: torch.Tensor, ranks: dict[str, int], learnt: JointGaussian) -> Position:
    size = len(matrix)
    one = torch.ones(size, dtype=torch.float64)
    depth = {name: i for i, name in enumerate(ranks)}
    return Position(JointCurvature(matrix, ranks, -1.0, 10), depth, 0.5 * one, size, one, learnt, {}, 1.0)


def test_the_best_of_each_structure_is_found_and_no_other_is_nearer() -> None:
    ranks = {"a": 3, "b": 4}
    matrix = 1e-2 * torch.linalg.inv(some_joint(ranks).covariance())
    exact = torch.linalg.inv(matrix + torch.eye(7, dtype=torch.float64))
    best = JointGaussian(torch.linalg.cholesky(exact).float(), ranks).restricted("layer", "conditional")
    worse = some_joint(ranks, seed=7).restricted("layer")
    positions = {name: _at(matrix, ranks, best if name == "full" else worse) for name in ("diagonal", "full")}
    found = {(row["weights"], row["q"]): row["kl"] for row in fit_rows(positions)}
    assert found["full", "learnt"] == pytest.approx(found["full", "best full in each layer"], abs=1e-5)
    assert found["full", "best diagonal"] < found["full", "learnt, correlations dropped"]
    assert found["diagonal", "learnt"] > found["diagonal", "best full in each layer"] > 0
    rows, _ = learnt_rows(positions["full"], 200, 0)
    assert [row["layer"] for row in rows] == ["a", "b", "all"]
    assert rows[-1]["conditional_cosine"] == pytest.approx(1) and rows[-1]["slope"] == pytest.approx(1, rel=1e-4)
    assert rows[-1]["rest_rms"] < 1e-4 and rows[-1]["p_order"] < 0.05


def test_pairs_are_counted_once_each_by_where_they_lie() -> None:
    ranks, depth = {"x": 3, "y": 2, "z": 4}, {"x": 5, "y": 5, "z": 6}
    masks = pairs(ranks, depth)
    assert [int(mask.sum()) for mask in masks.values()] == [3 + 1 + 6, 6, 20]
    assert torch.equal(sum(mask.int() for mask in masks.values()), torch.ones(9, 9).triu(1).int())
    covariance_ = torch.eye(9, dtype=torch.float64)
    covariance_[0, 3] = covariance_[3, 0] = 0.6  # x and y
    joint = JointGaussian(torch.linalg.cholesky(covariance_).float(), ranks)
    found = {row["pairs"]: row for row in correlation_rows(joint, depth)}
    assert list(found) == list(KINDS)
    assert found["same decoder layer"]["largest"] == pytest.approx(0.6)
    assert found["same decoder layer"]["above_0.5"] == pytest.approx(1 / 6)
    assert found["within a layer"]["largest"] == found["other decoder layers"]["largest"] == 0


@pytest.mark.parametrize("place, other", [("mle", "full"), ("full", "diagonal"), ("diagonal", "mle")])
def test_runs_of_another_kind_are_refused(place: str, other: str, call: Call, runs: Path) -> None:
    with pytest.raises(SystemExit, match="plain LoRA as --mle" if place == "mle" else f"with covariance: {place}"):
        call(f"--{place}={runs / other}")


def test_runs_of_another_task_are_refused(call: Call, runs: Path, tmp_path: Path) -> None:
    record = json.loads((runs / "full" / "scalabl.json").read_text())
    record["recipe"]["data"] = "boolq"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes((runs / "full" / name).read_bytes())
    (tmp_path / "copy" / "scalabl.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="has data 'boolq'"):
        call(f"--full={tmp_path / 'copy'}")
