"""The demo at a tiny size: every method is trained once, and an ensemble is of plain LoRA's runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scalabl.study import demo as demo_module
from scalabl.study.demo import MEMBERS, run_demo
from scalabl.study.demos import DEMOS, ROUTING


def test_the_demo_gathers_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, trained = DEMOS[ROUTING], []
    settings = known.settings | {"train_rows": 24, "validation_rows": 40, "max_length": 24, "layers": "last:1"}
    monkeypatch.setitem(DEMOS, ROUTING, replace(known, shifted_rows=6, settings=settings))
    train = demo_module.train
    monkeypatch.setattr(demo_module, "train", lambda *a, **k: (trained.append(a[1].name), train(*a, **k))[1])
    monkeypatch.setenv("SCALABL_CACHE", str(tmp_path / "cache"))
    report = run_demo(tmp_path / "runs", steps=2, test_rows=20, samples=3)
    plain, _, ensemble, tempered = (report.methods[i] for i in (0, 1, -2, -1))
    assert [m.name for m in report.methods if "calibrated" in m.name] == [
        "plain LoRA, calibrated", "MC dropout, N = 3, calibrated", f"{report.methods[4].name}, calibrated",
    ]  # fmt: skip
    assert report.lead == 5 and report.methods[4].name.startswith("ScalaBL")
    assert len(trained) == len(set(trained)) == len(known.methods) + MEMBERS - 1
    assert (ensemble.name, tempered.name) == (f"ensemble of {MEMBERS}", f"ensemble of {MEMBERS} + T")
    assert ensemble.log_probs.shape == (MEMBERS, 20, 20) and ensemble.ood[known.shifted].shape == (MEMBERS, 6, 20)
    torch.testing.assert_close(ensemble.log_probs[0], plain.log_probs[0])
    assert not torch.equal(ensemble.log_probs[1], ensemble.log_probs[2])  # of other seeds
    assert "400 training" not in report.facts["data"] and "24 training, 40 validation, 20 test" in report.facts["data"]
    assert list(report.training) == ["plain LoRA", "MC dropout", "ScalaBL"]
