"""The benchmark of scores of scope on a tiny classifier: a run found finished is not trained again, and its page."""

import json
import sys
from pathlib import Path

import out_of_scope
import pytest
from tiny_base import tiny_encoder, write_jsonl, write_texts


def test_a_table_of_every_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_texts(tmp_path / "data")
    write_jsonl(data / "out_of_scope.jsonl", [{"text": f"ninety-nine bee {i}", "label": "oos"} for i in range(15)])
    options = {
        "data": data, "model": tiny_encoder(), "rows": 24, "validation-rows": 9, "steps": 4, "batch-size": 8,
        "layers": "last:2", "rank": 4, "bootstrap": 20, "work": tmp_path / "work", "output": tmp_path / "out",
    }  # fmt: skip
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["out_of_scope.py", *given])
    out_of_scope.main()
    made = json.loads((tmp_path / "out" / "out_of_scope.json").read_text())
    run = made["runs"][0]
    assert set(run["scores"]) == {"probability", "entropy", "energy", "distance"} and run["out_of_scope"] == 15
    page = (tmp_path / "out" / "out_of_scope.md").read_text()
    assert f"{run['scores']['distance']['auroc']['value']:.3f}" in page
    assert str(data) not in page  # the place of the rows is the reader's own
    weights = tmp_path / "work" / "24_4" / "seed_0" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    out_of_scope.main()
    assert weights.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "out" / "out_of_scope.json").read_text())["runs"] == made["runs"]
