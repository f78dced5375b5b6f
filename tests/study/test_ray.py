"""The same plan by a local Ray: the same cells, done once."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_study import Done, content, finished_addresses, snapshot

from scalabl.core.errors import UserError
from scalabl.serving.ray_address import require_ray
from scalabl.study.plan import make_plan
from scalabl.study.predictions import read_predictions
from scalabl.study.run import run_ray
from scalabl.study.study import make_study


def test_a_local_ray_does_every_cell_once(
    base_directory: Path, task_directory: Path, tmp_path: Path, own_cache: Path, done: Done
) -> None:
    pytest.importorskip("ray")
    study = make_study(content(base_directory, task_directory, methods=["mle", "tfb"], seeds=[0]), "tiny")
    plan, looks = make_plan(study), []
    run_ray(plan, tmp_path, "local", report=lambda: looks.append(len(finished_addresses(plan, tmp_path))))
    assert finished_addresses(plan, tmp_path) == set(plan.cells) and looks[-1] == len(plan.cells)
    for entry in plan.entries:
        (here,) = (e for e in done.plan.entries if e.variant.name == entry.variant.name and e.seeds == entry.seeds)
        assert entry.training == here.training and entry.post_hoc == here.post_hoc
        by_ray = read_predictions(plan.cells[entry.prediction], tmp_path).tests[done.task][0]
        alone = read_predictions(done.plan.cells[here.prediction], done.output).tests[done.task][0]
        torch.testing.assert_close(by_ray, alone, atol=1e-4, rtol=0)
    before = snapshot(tmp_path)
    run_ray(plan, tmp_path, "local")
    assert snapshot(tmp_path) == before


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    with pytest.raises(UserError, match=r'pip install "scalabl\[ray\]"'):
        require_ray()


def test_a_cluster_that_is_not_there_is_named(done: Done, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match="The Ray cluster 127.0.0.1:1 cannot be reached"):
        run_ray(done.plan, tmp_path, "127.0.0.1:1")
