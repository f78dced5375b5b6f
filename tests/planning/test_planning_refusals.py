"""A training that cannot fit is refused before its weights are read, by a sentence that says what would help."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_base import questions, tiny_base, write_task

from scalabl.core.errors import UserError
from scalabl.planning import refusal as training_run
from scalabl.planning.plan import CannotPlanError, Planner
from scalabl.planning.refusal import plan_run
from scalabl.planning.step import PlannedRows
from scalabl.runs.models import load_tokenizer
from scalabl.runs.settings import Settings
from scalabl.scoring import Continuation, Letters


@pytest.fixture
def weightless(tmp_path: Path) -> Path:
    """A model directory without weights."""
    return shutil.copytree(tiny_base(layers=6), tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "task")


def settings_of(model: Path, task: Path, **settings: Any) -> Settings:
    return Settings.flat(
        **{"model": str(model), "data": str(task), "r": 4, "batch_size": 8, "validation_rows": 5, **settings}
    )


def have(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "machine_memory", lambda device: memory)


def test_the_sentence_names_what_helps_most_first(
    weightless: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan_run(settings_of(weightless, task))
    have(planned.training.peak - 1, monkeypatch)
    with pytest.raises(UserError) as refused:
        plan_run(settings_of(weightless, task))
    sentence = str(refused.value)
    assert "--ignore-memory" in sentence and "are available" in sentence
    left = re.findall(r"(--[a-z-]+(?: [\w:]+)?) \(([\d.]+) (MB|kB)\)", sentence)
    sizes = [float(size) * {"MB": 1e6, "kB": 1e3}[unit] for _, size, unit in left]
    assert sizes == sorted(sizes) and sizes[-1] < planned.training.peak
    options = [option.split(" ")[0] for option, _, _ in left]
    assert {"--batch-size", "--max-length", "--gradient-checkpointing", "--dtype", "--layers"} <= set(options)
    # each of them keeps its word
    halved = plan_run(settings_of(weightless, task, batch_size=4), ignore_memory=True)
    assert sizes[options.index("--batch-size")] == pytest.approx(halved.training.peak, rel=0.05)
    have(planned.training.peak, monkeypatch)
    assert plan_run(settings_of(weightless, task)).training == planned.training


def test_it_can_be_told_to_go_on(weightless: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(10, monkeypatch)
    assert plan_run(settings_of(weightless, task), ignore_memory=True).memory == 10


def test_processes_of_a_machine_share_its_memory(weightless: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan_run(settings_of(weightless, task))
    have(2 * planned.training.peak, monkeypatch)
    plan_run(settings_of(weightless, task))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="needs about"):
        plan_run(settings_of(weightless, task))


def test_the_rows_are_the_runs_own(weightless: Path, task: Path) -> None:
    rows = plan_run(settings_of(weightless, task, validation_rows=9)).rows
    assert rows.batch == 8
    tokenizer = load_tokenizer(str(weightless))
    own = [*questions(24, seed=0), *questions(9, seed=1)]
    text = [Continuation(tokenizer, max_length=300).encode(row) for row in own]
    lettered = [Letters(tokenizer, max_length=300).encode(row) for row in own]
    assert rows.length == max(len(row.input_ids) for row in (*text, *lettered))
    assert rows.scored == max(sum(segment > 0 for segment in row.segments) for row in text)
    cut = plan_run(settings_of(weightless, task, max_length=40)).rows
    assert cut.length == 40 < rows.length
    few = plan_run(settings_of(weightless, task, train_rows=3)).rows
    assert few.batch == 3


def test_stored_rows_are_part_of_the_plan(weightless: Path, task: Path) -> None:
    top = plan_run(settings_of(weightless, task, layers="last:2"))
    assert 0 < top.rows.stored <= 24 * top.rows.length * 32 * 4
    assert top.training.peak - top.rows.stored < plan_run(settings_of(weightless, task)).training.peak
    assert plan_run(settings_of(weightless, task, layers="last:2", gradient_checkpointing=True)).rows.stored == 0
    assert "stored rows" in top.in_words()


def test_what_cannot_be_planned_says_so(weightless: Path) -> None:
    with pytest.raises(CannotPlanError, match="monteclora"):
        Planner(Settings.flat(model=str(weightless), method="monteclora"), "cpu")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target_modules": "query"}, "target_modules names query"),
        ({"layers": "last:9"}, "layers is last:9, but the model has 6"),
        ({"r": 33}, "r is 33"),
    ],
)
def test_settings_are_refused_as_the_run_refuses_them(
    settings: dict[str, Any], sentence: str, weightless: Path, task: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        plan_run(settings_of(weightless, task, **settings))


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"length": 0}, {"scored": 0}, {"choices": 0}])
def test_rows_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        PlannedRows(**{"batch": 1, "length": 1, **wrong})
    with pytest.raises(UserError, match="loss is"):
        PlannedRows(1, 1, "words")
