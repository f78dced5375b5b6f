"""A study as cells in the order of their needs, with its rows, and the entries of its table. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scalabl.core.errors import UserError
from scalabl.data.example import Example, Task, rows_digest
from scalabl.data.load import load_task, rows_of
from scalabl.runs.registry import BASELINE, METHODS
from scalabl.runs.registry import POST_HOC as POST_HOC_METHODS
from scalabl.runs.settings import DEFAULTS
from scalabl.study.cells import POST_HOC, PREDICTION, TRAINING, Cell
from scalabl.study.study import Study, Variant


def tested_rows(task: str, limit: int | None) -> list[Example]:
    """The rows that a task is tested on: its test split, or so many of it, the same ones every time.

    Raises:
        UserError: the task has no test split, or a row without an answer.
    """
    return _labelled(rows_of(task, split="test", limit=limit), task)


def shifted_rows(task: str, limit: int | None, labels: Sequence[str] | None) -> list[Example]:
    """The rows of another task that a run is tested on: its test split if there is one, else every row.

    Raises:
        UserError: the run's class words do not fit, or a row without an answer.
    """
    return _labelled(rows_of(task, limit=limit, labels=labels), task)


def tuning_rows(task: Task) -> tuple[Example, ...]:
    """Every row that training, fits and temperatures may draw from: the train and validation splits."""
    return tuple(row for name in ("train", "validation") if name in task.splits for row in task.split(name))


def overlap(test: Sequence[Example], tuning: Sequence[Example]) -> int:
    """How many test rows are also tuning rows, by their content."""
    known = set(map(_question, tuning))
    return sum(_question(row) in known for row in test)


def _question(row: Example) -> tuple[Any, ...]:
    """A row without its answer, in whichever order its choices stand."""
    return row.question, frozenset(row.choices), *row.content[2:]


def _labelled(rows: list[Example], task: str) -> list[Example]:
    for row in rows:
        if row.answers is not None:
            raise UserError(
                f"Row {row.id} of {task} may have several labels, which no benchmark judges; use scalabl evaluate."
            )
        if row.answer is None:
            raise UserError(f"Row {row.id} of {task} has no answer; a benchmark needs answers in every row.")
    return rows


# settings younger than the first studies: left out of an address at their default, so that older cells keep theirs
LATER: tuple[str, ...] = ("quantization", "kl_normalization", "prior_mean", "class_weights")


@dataclass(frozen=True)
class Entry:
    """One variant trained on one task with one seed: a row of the table for each set that it is tested on.

    Attributes:
        variant, task: what, and what it is trained on.
        seeds: one, or those of an ensemble's members.
        training: addresses of its training cells, the members' for an ensemble.
        post_hoc: address of its fit, or None.
        prediction: address of its predictions.
    """

    variant: Variant
    task: str
    seeds: tuple[int, ...]
    training: tuple[str, ...]
    post_hoc: str | None
    prediction: str

    @property
    def addresses(self) -> tuple[str, ...]:
        """All of its cells."""
        return (*self.training, *([self.post_hoc] if self.post_hoc else []), self.prediction)


@dataclass(frozen=True)
class StudyPlan:
    """What a study needs done.

    Attributes:
        cells: by address, in the order of work; a cell stands behind those that it needs.
        entries: in the order of tasks, variants, seeds.
    """

    cells: Mapping[str, Cell]
    entries: tuple[Entry, ...]


def make_plan(study: Study) -> StudyPlan:
    """Cut a study into cells. Reads the rows of every task, so that nothing is missing later.

    Raises:
        UserError: a task, a split or an answer is missing, or a setting is out of range.
    """
    cells: dict[str, Cell] = {}
    entries: list[Entry] = []

    def add(cell: Cell) -> str:
        return cells.setdefault(cell.address, cell).address

    for task in study.tasks:
        loaded = load_task(task)
        loaded.split("train")
        learnt = rows_digest(tuning_rows(loaded))
        tests = _test_sets(study, task, loaded.labels)
        training = {
            (variant.name, seed): add(_training(study, variant, task, seed, learnt))
            for seed in study.seeds
            for variant in study.variants
        }
        for variant in study.variants:
            alone = [(seed,) for seed in study.seeds]
            for seeds in [study.seeds] if METHODS[variant.method].members else alone:
                runs = tuple(training[variant.name, seed] for seed in seeds)
                fitted = add(_post_hoc(variant, task, seeds, runs)) if variant.method in POST_HOC_METHODS else None
                entry = Entry(variant, task, seeds, runs, fitted, "")
                entries.append(replace(entry, prediction=add(_prediction(study, entry, tests))))
    # the first seed of everything comes first, so that there is a table to read early
    rank = {seed: i for i, seed in enumerate(study.seeds)}
    turns = sorted(entries, key=lambda entry: max(rank[seed] for seed in entry.seeds))
    order = dict.fromkeys(address for entry in turns for address in entry.addresses)
    return StudyPlan({address: cells[address] for address in order}, tuple(entries))


def _test_sets(study: Study, task: str, labels: tuple[str, ...] | None) -> dict[str, dict[str, Any]]:
    """Name -> digest and size of its rows; the task's own test set comes first."""
    rows = {task: tested_rows(task, study.test_rows)}
    for other in study.shift.get(task, ()):
        rows[other] = shifted_rows(other, study.shift_rows, labels)
    return {name: {"rows": len(some), "sha256": rows_digest(some)} for name, some in rows.items()}


def _training(study: Study, variant: Variant, task: str, seed: int, rows: str) -> Cell:
    training = study.training_settings(variant, task, seed)
    addressed = {k: v for k, v in training.as_dict().items() if k not in LATER or v != DEFAULTS[k]}
    name = BASELINE if variant.method in POST_HOC_METHODS else variant.name
    label = f"training {name} on {task}, {_seeds((seed,))}"
    return Cell(TRAINING, {"recipe": addressed, "rows_sha256": rows}, (), label)


def _post_hoc(variant: Variant, task: str, seeds: tuple[int, ...], runs: tuple[str, ...]) -> Cell:
    settings = {"method": variant.method, "run": runs[0], "members": list(runs[1:]), "seed": seeds[0]}
    return Cell(POST_HOC, settings, runs, f"fitting {variant.name} on {task}, {_seeds(seeds)}")


def _prediction(study: Study, entry: Entry, tests: dict[str, dict[str, Any]]) -> Cell:
    variant = entry.variant
    traits = METHODS[variant.method]
    reads_samples = (traits.sampled or traits.logit_draws) and variant.predictive != "linearized"
    settings = {
        "method": variant.method,
        "run": entry.training[0],
        "post_hoc": entry.post_hoc,
        "samples": variant.samples if reads_samples else 0,
        "seed": entry.seeds[0],
        "task": entry.task,
        "test_sets": tests,
        "test_rows": study.test_rows,
        "shift_rows": study.shift_rows,
        "batch_size": study.predict_batch_size,
    }
    if variant.predictive != "mc":  # else left out, so that cells of studies from before have their addresses
        settings["predictive"] = variant.predictive
    needs = (entry.post_hoc,) if entry.post_hoc else entry.training
    return Cell(PREDICTION, settings, needs, f"predicting {variant.name} on {entry.task}, {_seeds(entry.seeds)}")


def _seeds(seeds: tuple[int, ...]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


# what makes a training run another method's does not count as a difference
_OWN = ("method", "weight_decay", "lora_dropout")


def baseline_variant(study: Study, variant: Variant) -> Variant | None:
    """The plain LoRA that a variant is compared with, whose settings differ least; None if the study has none."""

    def settings(of: Variant) -> dict[str, Any]:
        training = study.training_settings(of, study.tasks[0], study.seeds[0]).as_dict()
        return {name: value for name, value in training.items() if name not in _OWN}

    own = settings(variant)
    plain = [(other, settings(other)) for other in study.variants if other.method == BASELINE]
    return min(plain, key=lambda pair: sum(own[k] != pair[1][k] for k in own), default=(None,))[0]


def baseline_of(study: Study, plan: StudyPlan, entry: Entry) -> Entry | None:
    """The MLE entry of the same task and (first) seed."""
    mle = baseline_variant(study, entry.variant)
    matches = (e for e in plan.entries if e.variant == mle and e.task == entry.task and e.seeds[0] == entry.seeds[0])
    return next(matches, None)
