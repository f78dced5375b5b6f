"""Damaged adapters, studies and manifests, and options that would be left unread: one sentence, nothing left behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from program import Program
from tiny_base import as_json, questions, tiny_base, write_jsonl, write_task

from scalabl.core.errors import UserError
from scalabl.runs.record import RunRecord
from scalabl.serving.shard_manifest import MANIFEST, ShardManifest, open_output
from scalabl.serving.shards import find_sources


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "task")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("r", None, "r is None; it must be a whole number; restore the file"),
        ("r", "four", "r is 'four'; it must be a whole number; restore the file"),
        ("lora_alpha", "x", "lora_alpha is 'x'; it must be a number; restore the file"),
    ],
)
def test_adapters_whose_configuration_is_damaged(
    program: Program, mle_run: Path, task: Path, tmp_path: Path, name: str, value: Any, message: str
) -> None:
    adapter, output = tmp_path / "adapter", tmp_path / "made"
    adapter.mkdir()
    shutil.copy(mle_run / "adapter_model.safetensors", adapter)
    config = json.loads((mle_run / "adapter_config.json").read_text(encoding="utf-8")) | {name: value}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert message in program("bayesianize", adapter, "--data", task, "--output", output).sentence()
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chat",), "chat belongs to a scoring, and a run keeps its own; name one with --scoring too"),
        (("--max-length", 7), "max_length belongs to a scoring"),
        (("--prior-precision", 1e308), "prior_precision is 1e+308; it must be a positive number, at most"),
        (("--json", "OUTPUT"), "is given twice"),
    ],
)
def test_settings_of_bayesianize(
    program: Program, mle_run: Path, task: Path, tmp_path: Path, options: tuple[Any, ...], message: str
) -> None:
    output = tmp_path / "made"
    given = [output if option == "OUTPUT" else option for option in options]
    assert message in program("bayesianize", mle_run, "--data", task, "--output", output, *given).sentence()
    assert not output.exists()


def _study(tmp_path: Path, task: Path, more: str = "", settings: str = "steps: 2") -> Path:
    recipe = tmp_path / "study.yaml"
    text = f"model: {tiny_base()}\ntasks: [{task}]\nmethods: [mle]\n{more}\nsettings: {{{settings}, r: 4}}\n"
    recipe.write_text(text, encoding="utf-8")
    return recipe


@pytest.mark.parametrize(
    ("more", "settings", "message"),
    [
        ("", "5: 2", "names 5, which is no setting"),
        ('name: "a\\0b"', "steps: 2", "choose a plain name"),
        ('name: ""', "steps: 2", "choose a plain name"),
    ],
)
def test_studies_that_cannot_be(
    program: Program, tmp_path: Path, task: Path, more: str, settings: str, message: str
) -> None:
    recipe, output = _study(tmp_path, task, more, settings), tmp_path / "cells"
    assert message in program("benchmark", recipe, "--output", output).sentence()
    assert not output.exists()


def test_tables_of_nothing_leave_nothing(program: Program, tmp_path: Path, task: Path) -> None:
    output = tmp_path / "cells"
    said = program("benchmark", _study(tmp_path, task), "--output", output, "--tables-only").sentence()
    assert "No prediction of this study is finished" in said
    assert not output.exists()


def test_results_that_cannot_be_written_are_found_before_the_first_cell(
    program: Program, tmp_path: Path, task: Path
) -> None:
    output, results = tmp_path / "cells", tmp_path / "results"
    (results / "results.csv").mkdir(parents=True)
    said = program("benchmark", _study(tmp_path, task), "--output", output, "--results", results).sentence()
    assert "results.csv cannot be written" in said
    assert not output.exists()


@pytest.mark.parametrize("resolved", [{"x": 1}, [], {"threshold": {"above": "far"}}, {"predictive": "mc"}])
def test_manifests_that_are_none(scalabl_run: Path, tmp_path: Path, resolved: Any) -> None:
    write_jsonl(tmp_path / "shards" / "a.jsonl", map(as_json, questions(3)))
    sources, output = find_sources(tmp_path / "shards"), tmp_path / "answers"
    manifest = ShardManifest({"sha256": RunRecord.read_classifier(scalabl_run).adapter_sha256}, {"seed": 0})
    output.mkdir()
    manifest.write(output)
    assert open_output(output, manifest, tmp_path / "shards", sources).resolved is None
    content = json.loads((output / MANIFEST).read_text(encoding="utf-8")) | {"resolved": resolved}
    (output / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="is no manifest of answers; choose another --output"):
        open_output(output, manifest, tmp_path / "shards", sources)
    (output / MANIFEST).unlink()
    (output / MANIFEST).mkdir()
    with pytest.raises(UserError, match="is no file; choose another --output"):
        open_output(output, manifest, tmp_path / "shards", sources)
