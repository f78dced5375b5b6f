"""The benchmark of open answers, on a tiny model: its runs, its figures, its table."""

import csv
import json
from pathlib import Path

import open_answers
import pytest
from tiny_base import tiny_base, write_jsonl


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Questions that a tiny model answers right now and then: the answer is one of two words."""
    folder = tmp_path / "colours"
    folder.mkdir()
    for split, number in (("train", 24), ("validation", 12), ("test", 10)):
        rows = [{"question": f"{split} {i}, red or blue?", "answers": [("red", "blue")[i % 2]]} for i in range(number)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def test_every_method_answers_and_is_judged(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "--model", str(tiny_base()), "--tasks", str(data), "--seeds", "0", "1", "--steps", "6", "--train-rows", "24",
        "--validation-rows", "12", "--test-rows", "10", "--samples", "3", "--max-new-tokens", "4", "--rounds", "1",
        "--layers", "last:1", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results"),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["open_answers.py", *options])
    open_answers.main()
    content = json.loads((tmp_path / "results" / "open_answers.json").read_text())
    assert [(r["method"], r["seed"]) for r in content["rows"]] == [
        (method, seed) for seed in (0, 1) for method in open_answers.METHODS
    ]
    for row in content["rows"]:
        tokens = {name: figures["tokens"] for name, figures in row["scores"].items()}
        assert tokens["log_probability"] == row["tokens_an_answer"]
        # plain LoRA alone pays for samples
        assert ("semantic_entropy" in tokens) == (row["method"] == "mle")
    assert set(content["costs"]["medians"]) == {*open_answers.METHODS, "mle + samples"}
    assert content["costs"]["medians"]["mle"] == 1.0
    # the ensemble's third member is a run of plain LoRA; the mean is a way to answer, not to train
    runs = sorted(path.name for path in (tmp_path / "runs" / "colours").iterdir() if path.is_dir())
    assert runs == sorted([*(f"{m}-{s}" for m in ("mc_dropout", "blob", "scalabl") for s in (0, 1)),
                           *(f"mle-{s}" for s in range(4))])  # fmt: skip
    lines = list(csv.DictReader((tmp_path / "results" / "open_answers.csv").open()))
    assert {line["method"] for line in lines} == set(open_answers.METHODS)
    assert "| scalabl mean, log probability |" in (tmp_path / "results" / "open_answers.md").read_text()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    open_answers.main()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before
