"""No test row is read in training or tuning."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tiny_base import as_json, questions, write_jsonl, write_task
from tiny_study import Done, content

from scalabl.data import Example, Task, load_task
from scalabl.metrics.uncertainty import fit_temperature
from scalabl.scoring.continuation import Continuation
from scalabl.study.benchmark import facts_of
from scalabl.study.cells import PREDICTION, finished
from scalabl.study.plan import make_plan
from scalabl.study.predictions import read_predictions
from scalabl.study.results import tidy
from scalabl.study.run import attempt
from scalabl.study.study import make_study
from scalabl.study.tested import overlap

METHODS = ["mle", "laplace", "tfb", "ensemble", "scalabl", "mc_dropout", "blob"]


def test_training_and_fits_read_no_test_row(
    base_directory: Path, task_directory: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row that a model ever sees goes through `encode`, and every row of a benchmark through `split`."""
    read: dict[str, set[str]] = defaultdict(set)
    splits: dict[str, set[str]] = defaultdict(set)
    kind = ""
    encode, split = Continuation.encode, Task.split

    def encoding(self: Continuation, example: Example) -> Any:
        read[kind].add(example.question)
        return encode(self, example)

    def splitting(self: Task, name: str) -> tuple[Example, ...]:
        splits[kind].add(name)
        return split(self, name)

    monkeypatch.setattr(Continuation, "encode", encoding)
    monkeypatch.setattr(Task, "split", splitting)
    settings = content(base_directory, task_directory)["settings"] | {"steps": 2}
    made = make_plan(make_study(content(base_directory, task_directory, methods=METHODS, settings=settings), "tiny"))
    for cell in made.cells.values():
        kind = cell.kind
        assert attempt(cell, tmp_path, "once")
        assert not (cell.directory(tmp_path) / "failed.json").exists()

    rows = {name: {row.question for row in load_task(str(task_directory)).splits[name]} for name in ("train", "test")}
    assert splits["training"] == splits["posthoc"] == {"train", "validation"}
    assert not (read["training"] | read["posthoc"]) & rows["test"]
    assert rows["train"] <= read["training"] and rows["test"] <= read["prediction"]
    assert not read["prediction"] & rows["train"]


def test_temperatures_are_fitted_on_validation_rows(done: Done) -> None:
    tempered = [row for row in done.rows if row["temperature"] is not None]
    assert len(tempered) == len(done.rows) / 2
    for row in tempered:
        cell = done.plan.cells[row["cell"]]
        assert row["temperature"] == fit_temperature(*read_predictions(cell, done.output).validation)


def test_rows_in_both_halves_are_counted(base_directory: Path, tmp_path: Path, own_cache: Path, done: Done) -> None:
    train, test = questions(8, seed=0), questions(6, seed=1)
    assert overlap(test, train) == 0
    shuffled = [Example("other", row.question, row.choices[::-1], 0) for row in train[:2]]
    assert overlap([*test, *shuffled], train) == 2
    predictions = [address for address, cell in done.plan.cells.items() if cell.kind == PREDICTION]
    counted = [finished(done.output, address)["rows_also_tuned_on"] for address in predictions]
    assert counted == [{done.task: 0, done.other: 0}] * len(predictions)

    task = write_task(tmp_path / "task")
    leaked = [as_json(row) | {"id": f"leaked {row.id}"} for row in questions(24, seed=0)[:3]]
    write_jsonl(task / "test.jsonl", [*leaked, *map(as_json, questions(5, seed=5))])
    study = make_study(content(base_directory, task, methods=["mle"], seeds=[0]), "tiny")
    made, output = make_plan(study), tmp_path / "output"
    for cell in made.cells.values():
        attempt(cell, output, "once")
    facts = facts_of(study, made, output, tidy(study, made, output), "command")
    assert facts[f"data, {task}"].endswith("test rows that are also training or validation rows: 3")
