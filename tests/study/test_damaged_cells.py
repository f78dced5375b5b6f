"""A cell whose facts are not what it wrote is a cell that is not finished: it is done anew, and read by nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_study import Done

from scalabl.core.errors import UserError
from scalabl.core.files import sha256
from scalabl.study.benchmark import facts_of, open_results
from scalabl.study.cells import failure, finished
from scalabl.study.predictions import VALIDATION, read_predictions

MEASURED = {"seconds": 1.5, "peak_memory": 3, "wall": 2.0, "device": "cpu", "versions": "x", "label": "l"}
TASK = {"name": "t", "source": "s", "licence": "l", "labels": None}
ROWS = {"train": 3, "validation": 1}
TRAINED = MEASURED | {"scoring": "head", "parameters": {"base": 1}, "rows": ROWS, "task": TASK}
PREDICTED = MEASURED | {
    "sha256": "a", "rows_also_tuned_on": {"t": 0},
    "validation_nll": {"raw": 1.0, "calibrated": None, "temperature": None},
}  # fmt: skip


def read(directory: Path, content: Any) -> dict[str, Any] | None:
    (directory / "cells" / "a").mkdir(parents=True, exist_ok=True)
    (directory / "cells" / "a" / "finished.json").write_text(json.dumps(content), encoding="utf-8")
    return finished(directory, "a")


def test_what_a_cell_writes_is_read(done: Done, tmp_path: Path) -> None:
    assert done.plan.cells and all(finished(done.output, address) is not None for address in done.plan.cells)
    for whole in (TRAINED, PREDICTED, MEASURED | {"extra_parameters": 3}):
        assert read(tmp_path, whole) == whole


@pytest.mark.parametrize(
    ("whole", "changes"),
    [
        (TRAINED, {"seconds": 0}), (TRAINED, {"seconds": float("nan")}), (TRAINED, {"seconds": float("inf")}),
        (TRAINED, {"seconds": "x"}), (TRAINED, {"wall": -1}), (TRAINED, {"wall": [1]}), (TRAINED, {"device": None}),
        (TRAINED, {"parameters": {"base": "x"}}), (TRAINED, {"scoring": 3}), (TRAINED, {"rows": []}),
        (TRAINED, {"rows": {"train": 3}}), (TRAINED, {"task": {"source": "s"}}),
        (PREDICTED, {"sha256": None}), (PREDICTED, {"rows_also_tuned_on": {"t": None}}),
        (PREDICTED, {"validation_nll": {"raw": 1.0}}), (PREDICTED, {"validation_nll": 3}), (MEASURED, {}),
    ],
)  # fmt: skip
def test_facts_that_no_cell_writes_are_none(tmp_path: Path, whole: dict[str, Any], changes: dict[str, Any]) -> None:
    assert read(tmp_path, whole | changes) is None
    assert read(tmp_path, [whole]) is None


def test_facts_of_another_kind_of_cell_are_none(tmp_path: Path) -> None:
    for whole, other, kind in ((TRAINED, PREDICTED, "training"), (PREDICTED, TRAINED, "prediction")):
        assert read(tmp_path, whole) == whole
        (tmp_path / "cells" / "a" / "settings.json").write_text(json.dumps({"kind": kind}), encoding="utf-8")
        assert read(tmp_path, whole) == whole
        assert read(tmp_path, other) is None
        (tmp_path / "cells" / "a" / "settings.json").unlink()


def test_a_failure_without_its_error_is_none(tmp_path: Path) -> None:
    (tmp_path / "cells" / "a").mkdir(parents=True)
    for content, expected in (({"error": "x"}, {"error": "x"}), ({"error": 3}, None), ({}, None), ([], None)):
        (tmp_path / "cells" / "a" / "failed.json").write_text(json.dumps(content), encoding="utf-8")
        assert failure(tmp_path, "a") == expected


@pytest.mark.parametrize("change", ["header", "lost", "nan", "classes", "labels", "fractions", "flat", "empty"])
def test_predictions_that_were_altered_and_signed_anew_are_refused_in_a_sentence(
    done: Done, tmp_path: Path, change: str
) -> None:
    cell = done.plan.cells[done.plan.entries[0].prediction]
    shutil.copytree(cell.directory(done.output), cell.directory(tmp_path))
    assert len(read_predictions(cell, tmp_path).validation[1]) > 0
    path = cell.directory(tmp_path) / "predictions.safetensors"
    tensors, log_probs, labels = load_file(path), f"{VALIDATION}|log_probs", f"{VALIDATION}|labels"
    if change == "lost":
        del tensors[labels]
    elif change == "nan":
        tensors[log_probs][0, 0, 0] = torch.nan
    elif change == "classes":
        tensors[labels][0] = tensors[log_probs].shape[2]
    elif change == "labels":
        tensors[labels] = tensors[labels][:-1].clone()
    elif change == "fractions":
        tensors[labels] = tensors[labels].float()
    elif change == "flat":
        tensors[log_probs] = tensors[log_probs].flatten()
    elif change == "empty":
        tensors |= {log_probs: tensors[log_probs][:, :0].clone(), labels: tensors[labels][:0].clone()}
    save_file(tensors, path)
    if change == "header":
        path.write_bytes(path.read_bytes()[:-1])
    facts = cell.directory(tmp_path) / "finished.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"sha256": sha256(path)}), encoding="utf-8")
    with pytest.raises(UserError, match="is missing or was altered; delete"):
        read_predictions(cell, tmp_path)


def test_a_page_is_made_where_a_training_is_no_longer_on_record(done: Done, tmp_path: Path) -> None:
    shutil.copytree(done.output / "cells", tmp_path / "cells")
    trained = done.plan.entries[0].training[0]
    assert "training" in facts_of(done.study, done.plan, tmp_path, done.rows, "c")[f"data, {done.task}"]
    (tmp_path / "cells" / trained / "finished.json").write_text("not json", encoding="utf-8")
    facts = facts_of(done.study, done.plan, tmp_path, done.rows, "c")
    assert facts[f"data, {done.task}"] == "what it was trained on is not on record"


def test_an_answer_that_is_no_text_is_refused_before_any_work(tmp_path: Path) -> None:
    open_results(tmp_path)
    (tmp_path / "answer.md").write_bytes(b"It d\xe1es.")
    with pytest.raises(UserError, match=r"answer\.md is no UTF-8 text \(.* at byte 4\); save it as UTF-8\.$"):
        open_results(tmp_path)
