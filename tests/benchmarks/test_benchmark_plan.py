"""The benchmark of planned memory, at toy size: what it measures, and what it writes."""

import csv
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import plan
import pytest
import torch
from tiny_base import tiny_base


def test_planned_stands_beside_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [plan.Case("training", layers="last:2", length=32), plan.Case("prediction", length=32, samples=3)]
    monkeypatch.setattr(plan, "cases", lambda: few)
    toy = ["--model", str(tiny_base()), "--output", str(tmp_path), "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr("sys.argv", ["plan.py", *toy])
    plan.main()
    content = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    training, prediction = content["cases"]
    assert training["planned_model"] > 0 and training["planned_work"] > 0
    # a toy's process grows by what libraries allocate, which is more than all of its tensors
    assert training["measured_work"] > training["planned_work"]
    assert training["work_error"] == round(training["planned_work"] / training["measured_work"] - 1, 4)
    assert prediction["samples"] == 3 and prediction["planned_work"] > 0
    with (tmp_path / "plan.csv").open(encoding="utf-8") as file:
        assert [row["what"] for row in csv.DictReader(file)] == ["training", "prediction"]
    page = (tmp_path / "plan.md").read_text(encoding="utf-8")
    assert "training, ScalaBL, layers last:2" in page and "of 2 works are within 15 %" in page
    assert {"model", "data", "versions", "device", "command"} <= set(content["facts"])


def test_a_failed_measurement_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stderr="layers is last:9, but the model has 3")
    monkeypatch.setattr("plan.subprocess", SimpleNamespace(run=lambda *_, **__: failed, DEVNULL=0, PIPE=0))
    monkeypatch.setattr("sys.argv", ["plan.py", "--model", str(tiny_base()), "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="layers is last:9, but the model has 3"):
        plan.main()
    assert not list(tmp_path.iterdir())


def test_the_scales_see_what_comes_and_goes() -> None:
    scales = plan.Scales(torch.device("cpu"))
    scales.reset()
    before = scales.now()
    tensor = torch.ones(25_000_000)
    held = scales.now() - before
    del tensor
    scales.reset()
    assert held == pytest.approx(100_000_000, rel=0.1)
    assert scales.now() - before < 20_000_000 and scales.peak() - before < 20_000_000


def test_the_cases_vary_one_thing_at_a_time() -> None:
    cases = plan.cases()
    assert len(set(cases)) == len(cases) >= 20
    for name, values in {
        "method": {"mle", "scalabl", "blob"},
        "gradient_checkpointing": {False, True},
        "layers": {"all", "last:8"},
        "batch": {2, 8},
        "dtype": {"float32", "bfloat16"},
        "what": {"training", "prediction"},
    }.items():
        assert {getattr(case, name) for case in cases} == values
    assert {case.samples for case in cases if case.what == "prediction"} == {1, 10}
