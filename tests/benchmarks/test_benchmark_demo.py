"""The demo over seeds: its statistics against known values, and that nothing known is done again."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import demo_seeds
import pytest
import torch
from demo_seeds import summarize
from harness import excludes_zero, mean_with_interval

from scalabl.inference.report.results import MethodResult, Report
from scalabl.inference.report.table import table
from scalabl.study.demos import DEMOS, ROUTING


def test_student_interval() -> None:
    found = mean_with_interval([1.0, 2.0, 3.0])
    # t(0.975; 2) = 4.302653
    assert (found["mean"], found["sd"]) == (2.0, 1.0)
    assert found["high"] == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)
    assert found["low"] == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert mean_with_interval([2.0]) == {"mean": 2.0, "sd": None, "low": None, "high": None}
    assert mean_with_interval([2.0, None])["mean"] is None


def _row(method: str, nll: float, *, accuracy: float = 0.6, collapsed: str | None = None) -> dict[str, Any]:
    values = {"accuracy": accuracy, "nll": nll, "ece": 0.1, "brier": 0.5, "auroc": None, "aurc": 0.3}
    metrics = {name: {"value": value} for name, value in values.items()}
    return {"method": method, "collapsed": collapsed, "ood": {}, "notes": [], **metrics}


def test_the_best_is_told_by_paired_differences() -> None:
    # the seeds differ by far more than the methods do: only the pairs tell B from A; C's difference is noise
    nll = {"A": (1.0, 2.0, 3.0), "B": (0.90, 1.91, 2.90), "C": (0.95, 1.80, 3.10)}
    tables = {seed: [_row(method, values[seed]) for method, values in nll.items()] for seed in range(3)}
    test = summarize(tables)["test"]
    assert ["nll" in test[method]["best"] for method in "ABC"] == [False, True, True]
    assert test["A"]["nll"]["difference"] is None
    b, c = (test[method]["nll"]["difference"] for method in "BC")
    assert excludes_zero(b["low"], b["high"])
    assert not excludes_zero(c["low"], c["high"])
    # all alike: no best; undefined: neither
    assert not any({"accuracy", "auroc"} & set(test[method]["best"]) for method in "ABC")


def test_one_seed_has_no_best_and_a_collapsed_method_is_never_best() -> None:
    one = summarize({0: [_row("A", 1.0), _row("B", 0.5)]})["test"]
    assert not one["A"]["best"] and not one["B"]["best"]
    tables = {
        seed: [_row("A", 1.0 + seed), _row("B", 0.9 + seed), _row("C", 0.1, collapsed="At chance" if seed else None)]
        for seed in range(3)
    }
    test = summarize(tables)["test"]
    assert test["C"]["collapsed"] == [1, 2] and not test["C"]["best"]
    assert test["B"]["best"] == ["nll"]


def test_seeds_of_other_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="other methods"):
        summarize({0: [_row("A", 1.0)], 1: [_row("B", 1.0)]})


def _report(seed: int, rows: int) -> Report:
    """Random predictions in the demo's form: one particle and three, with a shifted data set."""
    generator = torch.Generator().manual_seed(seed)

    def method(name: str, particles: int) -> MethodResult:
        def draw(n: int) -> torch.Tensor:
            return torch.randn(particles, n, 4, generator=generator).log_softmax(-1)

        labels = torch.arange(rows) % 4
        return MethodResult(name, draw(rows), labels, {"other": draw(8)}, {"other": labels[:8]}, [f"note {seed}"])

    facts = {"model": "random predictions", "data": f"{rows} rows", "seed": str(seed)}
    return Report("toy", facts, [method("plain LoRA", 1), method("ScalaBL, N = 3", 3)])


def test_results_are_written_and_what_is_known_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    def run(output: Path, *, task: str, seed: int, steps: int, test_rows: int, samples: int) -> Report:
        done.append(seed)
        (output / "mle").mkdir(exist_ok=True)
        (output / "mle" / "adapter_model.safetensors").write_bytes(bytes([seed]))
        return _report(seed, test_rows)

    monkeypatch.setattr(demo_seeds, "run_demo", run)
    results, runs = tmp_path / "results", tmp_path / "runs"
    line = [
        "demo_seeds.py",
        "--test-rows",
        "12",
        "--output",
        str(results),
        "--runs",
        str(runs),
        "--seeds",
        "0",
        "1",
        "2",
    ]
    monkeypatch.setattr("sys.argv", line)
    demo_seeds.main()
    assert done == [0, 1, 2]

    content = json.loads((results / "demo.json").read_text(encoding="utf-8"))
    accuracy = [table(_report(seed, 12))[1]["accuracy"]["value"] for seed in range(3)]
    assert content["summary"]["test"]["ScalaBL, N = 3"]["accuracy"]["values"] == accuracy
    assert content["facts"]["model"] == "random predictions" and content["facts"]["seeds"] == "0, 1, 2"
    page = (results / "demo.md").read_text(encoding="utf-8")
    picture = (results / "demo.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(picture).tag.endswith("svg") and "ScalaBL, N = 3" in picture
    assert "**at chance** in 3 of 3 seeds" in page and "## Shifted: other" in page and "seed 1: note 1" in page
    lines = list(csv.DictReader(io.StringIO((results / "demo.csv").read_text(encoding="utf-8"))))
    (epistemic,) = [x for x in lines if x["metric"] == "auroc_epistemic" and x["method"] == "ScalaBL, N = 3"]
    assert epistemic["data"] == "other" and 0 <= float(epistemic["mean"]) <= 1

    demo_seeds.main()
    assert done == [0, 1, 2]
    (runs / "seed1" / "mle" / "adapter_model.safetensors").write_bytes(b"trained anew")
    demo_seeds.main()
    assert done == [0, 1, 2, 1]
    monkeypatch.setitem(DEMOS, ROUTING, replace(DEMOS[ROUTING], shifted_rows=7))
    demo_seeds.main()
    assert done == [0, 1, 2, 1, 0, 1, 2]
