"""A cell whose facts are not what it wrote is a cell that is not finished: it is done anew, and read by nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_study import Done

from scalabl.study.cells import failure, finished

MEASURED = {"seconds": 1.5, "peak_memory": 3, "wall": 2.0, "device": "cpu", "versions": "x", "label": "l"}
TRAINED = MEASURED | {"scoring": "head", "parameters": {"base": 1}, "rows": {"train": 3}, "task": {"source": "s"}}
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
