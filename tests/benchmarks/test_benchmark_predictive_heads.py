"""The benchmark of heads on a tiny classifier: what is known is not measured again, and its page and picture."""

import csv
import json
import sys
from pathlib import Path

import predictive_heads
import pytest
from tiny_base import tiny_encoder, write_texts

from scalabl.runs.settings import Settings
from scalabl.training.run import train


def test_a_table_of_every_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_texts(tmp_path / "three-words")
    settings = Settings.flat(
        model=str(tiny_encoder()), data=str(data), steps=3, batch_size=8, layers="last:2", r=4, validation_rows=9
    )
    train(settings, tmp_path / "run")
    options = {
        "runs": tmp_path / "run", "rows": 9, "samples": 4, "seeds": 2, "reference": 8, "tops": 1, "batch": 4,
        "rounds": 2, "work": tmp_path / "work", "output": tmp_path / "out",
    }  # fmt: skip
    line = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["predictive_heads.py", *line])
    predictive_heads.main()
    made = json.loads((tmp_path / "out" / "predictive_heads.json").read_text())
    (bench,) = made["runs"]
    rows = {row["strategy"]: row for row in bench["rows"]}
    few = {f"{kind}, N = {number}" for kind, number in predictive_heads.FEW}
    assert set(rows) >= few | {"mean", "mc, N = 4", "linearized, top 1 of the classes", bench["chosen"]}
    assert rows["mean"]["epistemic_mean"] == 0 and rows["mean"]["modelled"] == 1
    assert all(row["measured"] > 0 and row["kl"] >= 0 and row["probability_error"] > 0 for row in rows.values())
    with (tmp_path / "out" / "predictive_heads.csv").open() as lines:
        assert [row["strategy"] for row in csv.DictReader(lines)] == list(rows)
    page = (tmp_path / "out" / "predictive_heads.md").read_text()
    assert "## 3 classes: three-words, 30 training rows, 9 test rows" in page and bench["sentence"] in page
    assert f"| {bench['chosen']} (auto) |" in page and str(data) not in page
    assert "3 classes" in (tmp_path / "out" / "predictive_heads.svg").read_text()
    monkeypatch.setattr(predictive_heads, "figures_of", None)
    predictive_heads.main()
    assert json.loads((tmp_path / "out" / "predictive_heads.json").read_text())["runs"] == made["runs"]
