"""The draws' errors at toy size: on a run of the tiny model, resumed, and against closed forms."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import draws
import pytest
import torch
from tiny_base import tiny_base, write_task

from scalabl.predictive import MonteCarloPredictive
from scalabl.runs.settings import Settings
from scalabl.training.run import train

TOY = ["--rows", "4", "--samples", "2", "4", "8", "--seeds", "2", "--reference", "66"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("draws")
    settings = Settings.flat(
        model=str(tiny_base()), data=str(write_task(directory / "task")), steps=2, batch_size=4, r=4, layers="last:2",
        scoring="continuation", learning_rate=0.05, init_sigma=0.5, validation_rows=4,
    )  # fmt: skip
    train(settings, directory / "run")
    return directory / "run"


def call(monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    line = ["draws.py", "--run", str(run), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", [*line, *TOY, *options])
    draws.main()
    found: dict[str, Any] = json.loads((tmp_path / "results" / "draws.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What was drawn: (kind, seed, particles)."""
    seen: list[tuple[str, int, int]] = []
    draw = MonteCarloPredictive.draw

    def counted(self: MonteCarloPredictive, scorer: Any, batch: Any, first: int, samples: int) -> torch.Tensor:
        seen.append((self.draws, self.seed, samples))
        return draw(self, scorer, batch, first, samples)

    monkeypatch.setattr(MonteCarloPredictive, "draw", counted)
    return seen


def test_results_are_written_and_what_is_known_is_not_done_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[tuple[str, int, int]]
) -> None:
    content = call(monkeypatch, run, tmp_path)
    assert sum(n for _, seed, n in passes if seed == draws.REFERENCE_SEED) == 66
    exact = content["reference"]
    assert exact["particles"] == 66 and 0 < exact["rmse"] < (exact["variance"] / 66) ** 0.5
    rows = {(row["draws"], row["samples"]): row for row in content["summary"]}
    assert len(rows) == 4 * 3 and all(row["rmse"]["low"] <= row["rmse"]["mean"] for row in rows.values())
    for kind in ("independent", "sobol"):
        assert exact["rmse"] < rows[kind, 8]["rmse"]["mean"] < rows[kind, 2]["rmse"]["mean"]
        assert 0 < rows[kind, 8]["kl"]["mean"] < rows[kind, 2]["kl"]["mean"]
    page = (tmp_path / "results" / "draws.md").read_text(encoding="utf-8")
    assert "33 independent antithetic pairs" in page and "(draws.svg)" in page and "- command: `" in page
    picture = (tmp_path / "results" / "draws.svg").read_text(encoding="utf-8")
    assert picture.count("antithetic") == 1 and "KL from the long run, nats" in picture
    lines = list(csv.DictReader(io.StringIO((tmp_path / "results" / "draws.csv").read_text(encoding="utf-8"))))
    assert len(lines) == 4 * 3 * 2
    own = [float(x["rmse"]) for x in lines if (x["draws"], x["samples"]) == ("sobol", "4")]
    assert sum(own) / 2 == pytest.approx(rows["sobol", 4]["rmse"]["mean"])
    squared = sum(x * x for x in own) / 2
    assert rows["sobol", 4]["worth"] == pytest.approx(content["reference"]["variance"] / squared)

    linear = content["linearized"]
    assert linear["kl"] > 0 and linear["worth"] == pytest.approx(exact["variance"] / linear["rmse"] ** 2)
    assert f"| linearised | – | {linear['rmse']:.2e} |" in page

    passes.clear()
    assert call(monkeypatch, run, tmp_path)["summary"] == content["summary"] and not passes
    call(monkeypatch, run, tmp_path, "--seeds", "3")
    assert {seed for _, seed, _ in passes} == {2} and sum(n for kind, _, n in passes if kind == "sobol") == 8
    passes.clear()
    call(monkeypatch, run, tmp_path, "--reference", "70")  # another reference is another comparison
    assert {seed for _, seed, _ in passes} == {0, 1, draws.REFERENCE_SEED}


def test_a_killed_run_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[tuple[str, int, int]]
) -> None:
    whole = call(monkeypatch, run, tmp_path / "whole")
    predict = draws.predict
    for after in (1, 4):  # in the reference, and among the kinds
        calls: list[int] = []

        def killed(*arguments: Any, calls: list[int] = calls, after: int = after, **options: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return predict(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(draws, "predict", killed)
            with pytest.raises(KeyboardInterrupt):
                call(monkeypatch, run, tmp_path / "killed")
    assert not (tmp_path / "killed" / "results").exists()
    passes.clear()
    assert call(monkeypatch, run, tmp_path / "killed")["summary"] == whole["summary"]
    # the last whole call drew neither the reference nor the kinds that were done
    assert draws.REFERENCE_SEED not in {seed for _, seed, _ in passes}
    assert ("independent", 0, 8) not in passes and ("moments", 1, 8) in passes


def test_errors_against_closed_forms() -> None:
    exact = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    probs = torch.tensor([[0.6, 0.4, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    found = draws.errors(probs, exact, torch.tensor([[True, True, False], [True, True, True]]))
    assert found["rmse"] == pytest.approx((2 * 0.01 / 5) ** 0.5)
    kl = 0.5 * (torch.tensor(0.5 / 0.6).log() + torch.tensor(0.5 / 0.4).log())
    assert found["kl"] == pytest.approx(kl.item() / 2)
    assert draws.errors(exact, exact, exact > 0) == {"rmse": 0.0, "kl": 0.0}


def test_n_independent_draws_are_worth_n() -> None:
    generator = torch.Generator().manual_seed(0)
    figures = []
    for seed in range(400):
        for number in (2, 8):
            error = float((0.1 * torch.randn(number, 60, generator=generator)).mean(dim=0).square().mean().sqrt())
            figures.append({"draws": "independent", "samples": number, "seed": seed, "rmse": error, "kl": 0.0})
    for other in draws.DRAWS[1:]:
        figures += [{**figure, "draws": other} for figure in figures if figure["draws"] == "independent"]
    for row in draws.summarize(figures, 0.01):
        assert row["worth"] == pytest.approx(row["samples"], rel=0.05)


def test_one_particle_is_refused(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, run, tmp_path, "--samples", "1")
    assert "at least 2" in capsys.readouterr().err
