"""The benchmark of the KL's normalisation, on a tiny model: its runs, its figures, its page."""

import json
from pathlib import Path

import posteriors
import pytest
from tiny_base import tiny_base, write_jsonl


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows with one to six trained words."""
    words = ("red", "blue", "green")
    rows = [{"prompt": f"Question: {i}?\nAnswer:", "completion": f" {words[i % 3]}" * (1 + i % 6)} for i in range(24)]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def test_rows_weigh_the_kl_more_and_bring_the_posterior_nearer_to_the_prior(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", str(tiny_base(layers=6)), "--data", str(data), "--steps", "30", "--rows", "5"]
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", ["posteriors.py", "kl_normalization", *options, *places])
    posteriors.main()
    token, sequence = json.loads((tmp_path / "results" / "kl_normalization.json").read_text())["rows"]
    assert token["KL divided by"].endswith("trained tokens") and sequence["KL divided by"] == "22 rows"
    assert sequence["KL (nats)"] < token["KL (nats)"] and sequence["sigma"] > token["sigma"]
    assert sequence["spread over particles (nats a row)"] > token["spread over particles (nats a row)"] > 0
    page = (tmp_path / "results" / "kl_normalization.md").read_text()
    assert f"| {token['KL divided by']} | 0 | {token['sigma']:.3f} |" in page
    # what is trained is not trained again
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    posteriors.main()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")} == before
