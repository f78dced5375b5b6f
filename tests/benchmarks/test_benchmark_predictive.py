"""Cost against quality at toy size: on runs of the tiny model with 4 and with 2 choices, and resumed."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import predictive
import pytest
import torch
from predictive import Passes, as_wide
from predictive_page import COLUMNS, judged, summarize
from tiny_base import as_json, questions, tiny_base, write_jsonl

from scalabl.data import Example
from scalabl.predictive import MonteCarloPredictive
from scalabl.runs.settings import Settings
from scalabl.training.run import train

TOY = [
    "--rows", "9", "--ood-rows", "4", "--samples", "4", "--reference", "16", "--reference-rows", "3",
    "--batches", "1", "3", "--rounds", "2", "--variance-rows", "3", "--top", "last:1",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("predictive")
    for choices in (4, 2):
        for seed, (split, number) in enumerate((("train", 16), ("validation", 6), ("test", 9))):
            rows = map(as_json, questions(number, choices=(choices,), seed=seed))
            write_jsonl(directory / f"task{choices}" / f"{split}.jsonl", rows)
        settings = Settings.flat(
            model=str(tiny_base()), data=str(directory / f"task{choices}"), steps=2, batch_size=4, r=4, layers="last:2",
            scoring="continuation", learning_rate=0.05, init_sigma=0.3, validation_rows=4,
        )  # fmt: skip
        train(settings, directory / f"run{choices}")
    shifted = write_jsonl(directory / "shifted.jsonl", map(as_json, questions(4, choices=(4,), seed=9)))
    return {"run": directory / "run4", "run2": directory / "run2", "ood": shifted}


def call(monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], tmp_path: Path, *more: str) -> dict[str, Any]:
    line = ["predictive.py", "--run", str(runs["run"]), "--run2", str(runs["run2"]), "--ood", str(runs["ood"])]
    line += ["--ood2", str(runs["ood"]), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", [*line, *TOY, *more])
    predictive.main()
    found: dict[str, Any] = json.loads((tmp_path / "results" / "predictive.json").read_text(encoding="utf-8"))
    return found


def test_every_strategy_is_measured_once_and_a_second_start_does_nothing_again(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, stopped = predictive._seconds, []

    def killed(*arguments: Any) -> float:
        stopped.append(1)
        if len(stopped) > 15:  # in the second round of the first batch size
            raise KeyboardInterrupt
        return seconds(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(predictive, "_seconds", killed)
        with pytest.raises(KeyboardInterrupt):
            call(monkeypatch, runs, tmp_path)
    assert not (tmp_path / "results").exists()
    (cost,) = (tmp_path / "work").glob("*/cost-1.json")
    first = json.loads(cost.read_text())
    assert len(first["rounds"]) == 1
    judged_before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*/*.safetensors")}
    assert len(judged_before) == 12 + 1  # each strategy of its own and the long-run average

    content = call(monkeypatch, runs, tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in judged_before.items())
    assert json.loads(cost.read_text())["rounds"][0] == first["rounds"][0]
    text = (tmp_path / "results" / "predictive.csv").read_text(encoding="utf-8")
    lines = list(csv.DictReader(io.StringIO(text)))
    assert list(lines[0])[:8] == ["strategy", "classes", "batch", "cost", "memory", "nll", "ece", "ood_auroc"]
    assert len(lines) == 14 * 2 * 2 and all(float(line["cost"]) > 0 for line in lines)
    rows = {(row["strategy"], row["classes"], row["batch"]): row for row in content["rows"]}
    for classes in (2, 4):
        mc = rows["mc, N = 4", classes, 1]
        for same in ("mc, N = 4, 4 passes", "mc, N = 4, one batch"):
            assert rows[same, classes, 1]["nll"] == mc["nll"]
        assert mc["nll_minus_mc"] == 0 and mc["kl"] > 0
        assert rows["mean", classes, 3]["ood_auroc_epistemic"] is None
        assert rows["sobol, N = 6", classes, 3]["cost"] == rows["antithetic, N = 6", classes, 3]["cost"]
        assert rows["linearized, s in last:1", classes, 1]["nll"] != rows["linearized", classes, 1]["nll"]
        assert rows["linearized", classes, 1]["modelled"] > 1 and rows["mean", classes, 1]["modelled"] is None
        assert content["choices"][str(classes)]["quality"].startswith("auto chose ")
    page = (tmp_path / "results" / "predictive.md").read_text(encoding="utf-8")
    assert "## 4 classes" in page and "## 2 classes" in page and "- device: " in page and "(predictive.svg)" in page
    picture = (tmp_path / "results" / "predictive.svg").read_text(encoding="utf-8")
    assert picture.count(">linearized<") == 1 and "2 classes, batch 1" in picture

    with monkeypatch.context() as patch:
        for name in ("_seconds", "_peak", "predict_rows"):
            patch.setattr(predictive, name, None)
        again = call(monkeypatch, runs, tmp_path)
    assert again["rows"] == content["rows"]


def test_runs_of_as_many_classes_are_refused(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, {**runs, "run2": runs["run"]}, tmp_path)
    assert "both runs have 4 classes" in capsys.readouterr().err


def test_rows_are_cut_to_their_right_choice_and_others() -> None:
    row = Example("x", "which?", ("a", "b", "c", "d"), 2)
    cut = as_wide(row, 2)
    assert len(cut.choices) == 2 and cut.choices[cut.answer or 0] == "c" and set(cut.choices) < set(row.choices)
    assert cut == as_wide(row, 2) and as_wide(row, 4) is row


def test_costs_are_medians_of_ratios_within_rounds() -> None:
    rounds = [{"plain": 1.0, "a": 2.0, "b": 10.0}, {"plain": 2.0, "a": 6.0}, {"plain": 4.0, "a": 4.0}]
    quality = {name: dict.fromkeys(COLUMNS, 0.5) for name in ("a", "b", "c")}
    for of in quality.values():
        for name in ("strategy", "classes", "batch", "cost", "cost_low", "cost_high", "rounds", "memory", "modelled"):
            of.pop(name)
    costs = {8: {"rounds": rounds, "memory": {"a": 5.0, "b": 6.0}}}
    rows = summarize(4, {"a": "a", "b": "b", "c": "b"}, costs, quality, {8: {"a": 1.5}}, "plain")
    assert [(row["strategy"], row["cost"], row["rounds"]) for row in rows] == [("a", 2, 3), ("b", 10, 1), ("c", 10, 1)]
    assert (rows[0]["cost_low"], rows[0]["cost_high"], rows[0]["modelled"]) == (1, 3, 1.5)
    assert rows[2]["memory"] == 6 and tuple(rows[0]) == COLUMNS


def test_quality_against_closed_forms() -> None:
    probs = torch.tensor([[[0.8, 0.2], [0.4, 0.6]]]).log()
    even = torch.full((1, 3, 2), 0.5).log()
    found = {"a": {"test": probs, "ood": even}, "b": {"test": even[:, :2], "ood": even}}
    quality = judged(found, even[:, :1], torch.tensor([0, 1]), "b")
    nll = -(torch.tensor(0.8).log() + torch.tensor(0.6).log()).item() / 2
    assert quality["a"]["nll"] == pytest.approx(nll)
    assert quality["a"]["nll_minus_mc"] == pytest.approx(nll - torch.tensor(2.0).log().item())
    assert quality["a"]["ood_auroc"] == 1 and quality["b"]["ood_auroc"] == 0.5
    kl = 0.5 * (torch.tensor(0.5 / 0.8).log() + torch.tensor(0.5 / 0.2).log()).item()
    assert quality["a"]["kl"] == pytest.approx(kl) and quality["b"]["kl"] == 0
    assert quality["a"]["ood_auroc_epistemic"] is None and quality["a"]["particles"] == 1


def test_passes_are_the_particles_of_one_batch(runs: dict[str, Path]) -> None:
    from scalabl.predictive import predict
    from scalabl.runs.loading import load_run
    from scalabl.scoring import Scorer

    run = load_run(runs["run"])
    rows = run.encode(questions(3, choices=(4,)))
    one = predict(run.scorer, rows, MonteCarloPredictive(4))
    apart = predict(Scorer(run.scorer.model, run.scoring), rows, Passes(MonteCarloPredictive(4)))
    torch.testing.assert_close(one.exp(), apart.exp(), atol=1e-5, rtol=0)
