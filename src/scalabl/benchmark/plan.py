"""A study as cells in the order of their needs, and the entries that its table is made of. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from scalabl.benchmark.cells import POST_HOC, PREDICTION, TRAINING, Cell, rows_digest
from scalabl.benchmark.data import shifted_rows, tested_rows, tuning_rows
from scalabl.benchmark.study import Study, Variant
from scalabl.methods import POST_HOC as POST_HOC_METHODS
from scalabl.tasks import load_task
from scalabl.training.recipe import Recipe

# methods whose predictions do not depend on a number of samples
_WITHOUT_SAMPLES = ("mle", "map", "monteclora", "ensemble", "subspace_laplace")
# settings younger than the first studies: left out of an address at their default, so that older cells keep theirs
LATER: tuple[str, ...] = ("quantization", "kl_normalization", "prior_mean")


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
class Plan:
    """What a study needs done.

    Attributes:
        cells: by address, in the order of work; a cell stands behind those that it needs.
        entries: in the order of tasks, variants, seeds.
    """

    cells: Mapping[str, Cell]
    entries: tuple[Entry, ...]


def make_plan(study: Study) -> Plan:
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
            for seeds in [study.seeds] if variant.method == "ensemble" else alone:
                runs = tuple(training[variant.name, seed] for seed in seeds)
                fitted = add(_post_hoc(variant, task, seeds, runs)) if variant.method in POST_HOC_METHODS else None
                prediction = add(_prediction(study, variant, task, seeds, runs, fitted, tests))
                entries.append(Entry(variant, task, seeds, runs, fitted, prediction))
    # the first seed of everything comes first, so that there is a table to read early
    rank = {seed: i for i, seed in enumerate(study.seeds)}
    turns = sorted(entries, key=lambda entry: max(rank[seed] for seed in entry.seeds))
    order = dict.fromkeys(address for entry in turns for address in entry.addresses)
    return Plan({address: cells[address] for address in order}, tuple(entries))


def _test_sets(study: Study, task: str, labels: tuple[str, ...] | None) -> dict[str, dict[str, Any]]:
    """Name -> digest and size of its rows; the task's own test set comes first."""
    rows = {task: tested_rows(task, study.test_rows)}
    for other in study.shift.get(task, ()):
        rows[other] = shifted_rows(other, study.shift_rows, labels)
    return {name: {"rows": len(some), "sha256": rows_digest(some)} for name, some in rows.items()}


def _training(study: Study, variant: Variant, task: str, seed: int, rows: str) -> Cell:
    recipe = study.recipe(variant, task, seed)
    settings = {"recipe": _addressed(recipe), "rows_sha256": rows}
    name = "mle" if variant.method in POST_HOC_METHODS else variant.name
    return Cell(TRAINING, settings, (), f"training {name} on {task}, seed {seed}")


def _addressed(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides an address."""
    defaults = {field.name: field.default for field in fields(Recipe)}
    return {k: v for k, v in recipe.as_dict().items() if k not in LATER or v != defaults[k]}


def _post_hoc(variant: Variant, task: str, seeds: tuple[int, ...], runs: tuple[str, ...]) -> Cell:
    settings = {"method": variant.method, "run": runs[0], "members": list(runs[1:]), "seed": seeds[0]}
    return Cell(POST_HOC, settings, runs, f"fitting {variant.name} on {task}, {_seeds(seeds)}")


def _prediction(
    study: Study,
    variant: Variant,
    task: str,
    seeds: tuple[int, ...],
    runs: tuple[str, ...],
    fitted: str | None,
    tests: dict[str, dict[str, Any]],
) -> Cell:
    without_samples = variant.method in _WITHOUT_SAMPLES or variant.predictive == "linearized"
    settings = {
        "method": variant.method,
        "run": runs[0],
        "post_hoc": fitted,
        "samples": 0 if without_samples else variant.samples,
        "seed": seeds[0],
        "task": task,
        "test_sets": tests,
        "test_rows": study.test_rows,
        "shift_rows": study.shift_rows,
        "batch_size": study.predict_batch_size,
    }
    if variant.predictive != "mc":  # else left out, so that cells of studies from before have their addresses
        settings["predictive"] = variant.predictive
    needs = (fitted,) if fitted else runs
    return Cell(PREDICTION, settings, needs, f"predicting {variant.name} on {task}, {_seeds(seeds)}")


def _seeds(seeds: tuple[int, ...]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
