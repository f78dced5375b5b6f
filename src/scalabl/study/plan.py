"""A study as cells in the order of their needs, with its rows, and the entries of its table. Imports no torch."""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scalabl.data.example import rows_digest
from scalabl.data.load import load_task
from scalabl.runs.registry import BASELINE, METHODS
from scalabl.runs.registry import POST_HOC as POST_HOC_METHODS
from scalabl.study.cells import POST_HOC, PREDICTION, TRAINING, Cell, failure, finished
from scalabl.study.study import Study
from scalabl.study.tested import TYPOS, rows_of_set, sets_of, tuning_rows
from scalabl.study.variants import Variant, in_words

# settings younger than the first studies, and what held before: left out of an address at that, so that older cells
# keep theirs
LATER: dict[str, Any] = {
    "quantization": "bitsandbytes", "kl_normalization": "token", "prior_mean": 0.0, "class_weights": None,
    "rows_per_class": None, "template": None,
}  # fmt: skip
# methods that come to something else than in earlier versions under the same settings (A begins at the length of LoRA's
# draw, and clipping shortens the KL's gradient too; validation rows choose the precision); part of an address, so that
# cells from before are not taken for today's
REVISIONS = {"scalabl": 2, "laplace": 1, "subspace_laplace": 1}
# a training of any method (rows that fill no batch are others in every epoch, not the longest ones in all of them)
TRAINING_REVISION = 1
# and predictives (tau is that of the particles where auto takes these under it; costs are compared at one batch size)
PREDICTIVE_REVISIONS = {"calibrated": 1, "auto": 1}

TRIED = "tried.csv"
LOSSES = ("validation_nll", "calibrated_validation_nll")  # its columns, NLL in nats as it is and with a temperature


@dataclass(frozen=True)
class Attempt:
    """Settings tried on one task under the first seed: what its validation rows say decides whether they are chosen.

    Attributes:
        variant, task: whose, and on what.
        point: the settings.
        training, prediction: addresses of its cells; validation rows alone are predicted.
    """

    variant: Variant
    task: str
    point: Mapping[str, Any]
    training: str
    prediction: str


@dataclass(frozen=True)
class Entry:
    """One variant trained on one task with one seed: a row of the table for each set that it is tested on.

    Attributes:
        variant, task: what, and what it is trained on.
        seeds: one, or those of an ensemble's members.
        training: addresses of its training cells, the members' for an ensemble.
        post_hoc: address of its fit, or None.
        prediction: address of its predictions.
        chosen: of the settings that were tried; empty where none were.
    """

    variant: Variant
    task: str
    seeds: tuple[int, ...]
    training: tuple[str, ...]
    post_hoc: str | None
    prediction: str
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def addresses(self) -> tuple[str, ...]:
        """All of its cells."""
        return (*self.training, *([self.post_hoc] if self.post_hoc else []), self.prediction)


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task as a plan knows them.

    Attributes:
        learnt: digest of the rows that training and tuning may draw from.
        tests: name -> digest, size and kind of each set that it is tested on; its own comes first.
    """

    learnt: str
    tests: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class StudyPlan:
    """What a study needs done, as far as it is known: where settings are tried, a task's runs with the chosen ones are
    planned once every trial of it is finished.

    Attributes:
        cells: by address, in the order of work; a cell stands behind those that it needs.
        entries: in the order of tasks, variants, seeds.
        attempts: settings tried, in the order of tasks, variants, settings.
        study, rows: what it was made from.
        known: address of an attempt's prediction -> its figures ("raw", "calibrated", "temperature"), where the results
            of an earlier call have them; such an attempt has no cells of its own.
        choices: (task, variant's name) -> the settings that were chosen.
    """

    cells: Mapping[str, Cell]
    entries: tuple[Entry, ...]
    attempts: tuple[Attempt, ...] = ()
    study: Study | None = None
    rows: Mapping[str, TaskRows] = field(default_factory=dict)
    known: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    choices: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    def figures(self, output: Path, attempt: Attempt) -> Mapping[str, Any] | None:
        """The NLL in nats of an attempt's validation rows, "raw" and "calibrated" by the "temperature" that suits them,
        None where it is no number, as of a training that diverged; None before it is finished."""
        known = self.known.get(attempt.prediction)  # of the same address, and so what its cell would say
        done = finished(output, attempt.prediction) if known is None else None
        if known is None and done is None and (failure(output, attempt.training) or {}).get("diverged"):
            return dict.fromkeys(("raw", "calibrated", "temperature"))
        return known if done is None else done["validation_nll"]

    def renewed(self, output: Path) -> StudyPlan:
        """The plan with every choice that the cells finished by now allow; itself where there is no new one."""
        choices = self.chosen(output)
        if self.study is None or choices == self.choices:
            return self
        return _planned(self.study, self.rows, self.known, choices)

    def chosen(self, output: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
        """(task, variant's name) -> the settings with the lowest NLL of validation rows, with a temperature.

        There is none before all of them are finished; of equal ones the first is taken.
        """
        tried: dict[tuple[str, str], list[tuple[Mapping[str, Any] | None, Mapping[str, Any]]]] = {}
        for attempt in self.attempts:
            pair = self.figures(output, attempt), attempt.point
            tried.setdefault((attempt.task, attempt.variant.name), []).append(pair)
        return {
            key: min(pairs, key=lambda pair: _loss(pair[0]))[1]
            for key, pairs in tried.items()
            if all(figures is not None for figures, _ in pairs)
        }


def _loss(figures: Mapping[str, Any] | None) -> float:
    loss = None if figures is None else figures["calibrated"]
    return math.inf if loss is None else float(loss)


def make_plan(study: Study, output: Path | None = None, results: Path | None = None) -> StudyPlan:
    """Cut a study into cells. Reads the rows of every task, so that nothing is missing later.

    Args:
        study: what to plan.
        output: where cells may be finished, by which tried settings are chosen.
        results: of an earlier call, perhaps elsewhere; settings that are in its tried.csv are not tried again.

    Raises:
        UserError: a task, a split or an answer is missing, or a setting is out of range.
    """
    known: dict[Any, Any] = {}
    rows = {task: _rows(study, task, known) for task in study.tasks}
    made = _planned(study, rows, {} if results is None else tried_before(results / TRIED), {})
    return made if output is None else made.renewed(output)


def tried_before(path: Path) -> dict[str, dict[str, Any]]:
    """Address of an attempt's prediction -> its figures, as a tried.csv has them; empty where there is none.

    An address is made of everything that decides the figures. A line that cannot be read is left out.
    """
    found = {}
    with suppress(OSError, UnicodeDecodeError, csv.Error), path.open(encoding="utf-8", newline="") as lines:
        for line in csv.DictReader(lines):
            with suppress(KeyError, TypeError, ValueError):
                values = [float(line[name]) if line[name] else None for name in (*LOSSES, "temperature")]
                figures = dict(zip(("raw", "calibrated", "temperature"), values, strict=True))
                if all(value is None or math.isfinite(value) for value in figures.values()):
                    found[line["cell"]] = figures
    return found


def _rows(study: Study, name: str, known: dict[Any, Any]) -> TaskRows:
    """The rows of a task; what tasks of the same data have in common is read once, and lies in `known`."""

    def once(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        return known[key] if key in known else known.setdefault(key, make())

    data = study.task(name).data
    task = once((data,), lambda: load_task(data))
    task.split("train")

    def facts(tested: str, what: Mapping[str, Any]) -> dict[str, Any]:
        limits = {"test_rows": study.test_rows, "shift_rows": study.shift_rows}
        rows = rows_of_set(tested, what, task, of=name, data=data, **limits)
        return {"rows": len(rows), "sha256": rows_digest(rows)}

    tests: dict[str, Mapping[str, Any]] = {}
    for tested, what in sets_of(study, name).items():
        own = tested == name or TYPOS in what  # whatever the task is called
        key = (data, "" if own else tested, *what.items())
        tests[tested] = once(key, functools.partial(facts, tested, what)) | what
    return TaskRows(once((data, "learnt"), lambda: rows_digest(tuning_rows(task))), tests)


def _planned(
    study: Study,
    rows: Mapping[str, TaskRows],
    known: Mapping[str, Mapping[str, Any]],
    choices: Mapping[tuple[str, str], Mapping[str, Any]],
) -> StudyPlan:
    cells: dict[str, Cell] = {}
    attempts: list[Attempt] = []
    entries: list[Entry] = []

    def add(cell: Cell) -> str:
        return cells.setdefault(cell.address, cell).address

    for task in study.tasks:
        learnt, tests = rows[task].learnt, rows[task].tests
        chosen_on = study.task(task).chosen_on or task
        for variant in study.variants:
            runs_on = study.runs_on(variant, task)
            if variant.chooses and runs_on and chosen_on == task:
                for point in variant.tried:
                    training = _training(study, variant, task, study.seeds[0], learnt, point)
                    trial = Entry(variant, task, study.seeds[:1], (training.address,), None, "", point)
                    prediction = _prediction(study, trial, {})
                    attempts.append(Attempt(variant, task, point, training.address, prediction.address))
                    if prediction.address not in known:
                        add(training)
                        add(prediction)
            if variant.tried and (chosen_on, variant.of) not in choices:
                continue
            point = choices.get((chosen_on, variant.of), {})
            for seeds in runs_on:
                runs = tuple(add(_training(study, variant, task, seed, learnt, point)) for seed in seeds)
                fitted = add(_post_hoc(variant, task, seeds, runs)) if variant.method in POST_HOC_METHODS else None
                entry = Entry(variant, task, seeds, runs, fitted, "", point)
                entries.append(replace(entry, prediction=add(_prediction(study, entry, tests))))
    order = dict.fromkeys(address for each in _in_turn(study, attempts, entries) for address in each)
    in_order = {address: cells[address] for address in order if address in cells}
    return StudyPlan(in_order, tuple(entries), tuple(attempts), study, rows, known, choices)


def _in_turn(study: Study, attempts: Sequence[Attempt], entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """The addresses of each, wave by wave: what is tried first, then the first seed of everything, so that there is a
    table to read early."""
    every = dict.fromkeys((*study.seeds, *(seed for variant in study.variants for seed in study.seeds_of(variant))))
    rank = {seed: i for i, seed in enumerate(every)}

    def wave(of: Attempt | Entry) -> int:
        return max(of.variant.wave, study.task(of.task).wave)

    turns: list[tuple[tuple[int, int], tuple[str, ...]]]
    turns = [((wave(a), -1), (a.training, a.prediction)) for a in attempts]
    turns += [((wave(e), max(rank[seed] for seed in e.seeds)), e.addresses) for e in entries]
    return [addresses for _, addresses in sorted(turns, key=lambda turn: turn[0])]


def _training(study: Study, variant: Variant, task: str, seed: int, rows: str, point: Mapping[str, Any]) -> Cell:
    training = study.training_settings(variant, task, seed, point)
    addressed = {k: v for k, v in training.as_dict().items() if k not in LATER or v != LATER[k]}
    name = BASELINE if variant.method in POST_HOC_METHODS else variant.of
    with_point = f" ({in_words(point)})" if point else ""
    label = f"training {name}{with_point} on {task}, {_seeds((seed,))}"
    settings = {"recipe": addressed, "rows_sha256": rows, **_revision(training.method)}
    if TRAINING_REVISION:  # left out at 0, which older cells are of
        settings["training"] = TRAINING_REVISION
    return Cell(TRAINING, settings, (), label)


def _revision(method: str) -> dict[str, int]:
    return {"revision": REVISIONS[method]} if method in REVISIONS else {}


def _post_hoc(variant: Variant, task: str, seeds: tuple[int, ...], runs: tuple[str, ...]) -> Cell:
    settings = {"method": variant.method, "run": runs[0], "members": list(runs[1:]), "seed": seeds[0]}
    settings |= _revision(variant.method)
    return Cell(POST_HOC, settings, runs, f"fitting {variant.name} on {task}, {_seeds(seeds)}")


def _prediction(study: Study, entry: Entry, tests: Mapping[str, Mapping[str, Any]]) -> Cell:
    """Predictions of validation rows, and of the test sets, if there are any."""
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
        "test_sets": {name: dict(facts) for name, facts in tests.items()},
        "test_rows": study.test_rows if tests else None,
        "shift_rows": study.shift_rows if tests else None,
        "batch_size": study.predict_batch_size,
    }
    if variant.predictive != "mc":  # else left out, so that cells of studies from before have their addresses
        settings["predictive"] = variant.predictive
        if variant.predictive in PREDICTIVE_REVISIONS:
            settings["revision"] = PREDICTIVE_REVISIONS[variant.predictive]
    if (data := study.task(entry.task).data) != entry.task:
        settings["data"] = data
    needs = (entry.post_hoc,) if entry.post_hoc else entry.training
    trial = "" if tests else f", validation rows ({in_words(entry.chosen)})"
    return Cell(PREDICTION, settings, needs, f"predicting {variant.name} on {entry.task}, {_seeds(entry.seeds)}{trial}")


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


def baselines_of(study: Study, plan: StudyPlan, entry: Entry) -> list[Entry]:
    """The MLE entries of the same task, that of the same (first) seed first."""
    mle = baseline_variant(study, entry.variant)
    matches = (each for each in plan.entries if each.variant == mle and each.task == entry.task)
    return sorted(matches, key=lambda each: each.seeds[0] != entry.seeds[0])
