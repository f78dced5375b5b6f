"""A study: what is compared with what, on which data, how often. Imports no torch.

# Which question it answers, in the comment that the file begins with; it stands above the tables.
model: smollm2-135m-instruct
results: docs/results/mine               where its tables and pictures go; runs/benchmark/NAME if left out
tasks:                                   trained and tested on: a name or path, or a mapping with settings of its own
  - openbookqa
  - {name: bank few, data: rows/bank, rows_per_class: 5, steps: 300, out_of_scope: [rows/shop]}
shift: {openbookqa: [arc-easy]}          trained on -> tested on as well
typos: [0.05, 0.15]                      and each task on its own test rows with so many of their characters mistyped
methods:                                 a name, or a mapping with a name, settings and a grid of its own
  - mle
  - {method: blob, name: blob mean, samples: 0}
  - {method: scalabl, name: scalabl linearized, predictive: linearized}     mc if left out, or auto, calibrated
  - {method: scalabl, grid: {r: [4, 8, 16]}}
  - {method: map, tried: {weight_decay: [0.01, 0.1], learning_rate: [1e-3, 2e-3]}}
seeds: [0, 1, 2]
samples: 10                              particles
test_rows: 500                           of a task's test split; the same ones for everybody
shift_rows: 200                          of each shifted set
validation_rows: 300                     for temperatures and the choice of scoring
predict_batch_size: 8
settings: {steps: 200, layers: "last:8"}                 of every training run (the fields of `scalabl train`)
method_settings: {map: {weight_decay: 0.01}}             of one method's runs

What is more particular wins: settings, then the method's own defaults, method_settings, those of a variant, of a task,
and one that is tried.

Of settings that are `tried` (a mapping of lists, or a list of mappings) one is chosen on each task, by the NLL of its
validation rows under the first seed and with a temperature, and taken for all seeds; no test row is read before. A
task with `chosen_on: OTHER` takes what was chosen on the other one. A variant `of` another one has the other's runs and
choice; a method fitted on finished runs is of the first `mle`.

    - {name: scalabl mean, of: scalabl, samples: 0}
    - {name: ensemble of 3, method: ensemble, members: 3}      the runs of the first three seeds; all, if left out

Further keys of an entry of methods: `seeds` of its own, `tasks`, where they are fewer, and `wave`, a number: cells of a
higher one come later. Tasks may have a `wave` too, and `seeds`, where they are fewer.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.files import read_yaml
from scalabl.runs.registry import METHODS
from scalabl.runs.settings import DEFAULTS, Settings, make_settings
from scalabl.study.tasks import StudyTask, mapping_in, rates_in, seeds_in, settings_in, tasks_in, texts_in, whole
from scalabl.study.variants import TEMPERED, Variant, variants_in

# settings that no plain LoRA reads, at one value of each, so that equal runs have equal addresses for good
_OF_POSTERIORS: dict[str, Any] = {
    "variational_learning_rate": 2e-2, "beta": 1.0, "schedule": "elbo", "kl_warmup": 0.1, "covariance": "diagonal",
    "prior_std": 1.0, "init_sigma": 0.05, "unit_rows": True, "prior_mean": 0.0, "empirical_prior": False,
    "draws": "sequence", "kl": "reverse", "stochastic_modules": None, "stochastic_layers": None,
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """A benchmark's recipe.

    Attributes:
        about: the question that it answers.
        results: where its tables and pictures go, or None.
        others: as in the module's text.

    Raises:
        UserError: on reading, a value that cannot work; the sentence names it.
    """

    name: str
    model: str
    tasks: tuple[str, ...]
    shift: Mapping[str, tuple[str, ...]]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    samples: int = 10
    test_rows: int | None = None
    shift_rows: int | None = None
    validation_rows: int = 300
    predict_batch_size: int = 8
    settings: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    results: Path | None = None
    typos: tuple[float, ...] = ()
    of_tasks: Mapping[str, StudyTask] = field(default_factory=dict)

    def task(self, name: str) -> StudyTask:
        """What is known of a task."""
        return self.of_tasks.get(name, StudyTask(name, name))

    def seeds_of(self, variant: Variant) -> tuple[int, ...]:
        """The seeds of a variant's runs; of an ensemble those of its members."""
        return self.seeds if variant.seeds is None else variant.seeds

    def runs_on(self, variant: Variant, task: str) -> list[tuple[int, ...]]:
        """The seeds of each run of a variant on a task, all members' of an ensemble; none where it is not run."""
        if variant.tasks is not None and task not in variant.tasks:
            return []
        seeds, only = self.seeds_of(variant), self.task(task).seeds
        runs = [seeds[: variant.members]] if METHODS[variant.method].members else [(seed,) for seed in seeds]
        return [run for run in runs if only is None or set(run) <= set(only)]

    def training_settings(
        self, variant: Variant, task: str, seed: int, chosen: Mapping[str, Any] | None = None
    ) -> Settings:
        """The training run of a variant, with the settings that were chosen where some are tried.

        Raises:
            UserError: a setting that does not exist or is out of range.
        """
        on = self.task(task)
        values = {
            **variant.settings,
            **on.settings,
            **(chosen or {}),
            "model": on.model or self.model,
            "data": on.data,
            "method": variant.trained_method,
            "seed": seed,
            "validation_rows": self.validation_rows,
        }
        try:
            training = make_settings(values)
        except UserError as error:
            raise UserError(f"{variant.name}: {error}") from error
        if not METHODS[training.method].variational:
            training = training.changed(**_OF_POSTERIORS)
        return training


def read_study(path: Path) -> Study:
    """A study from a YAML file.

    Raises:
        UserError: the file cannot be read, or holds what is no study.
    """
    missing = f"There is no recipe {path}; give a YAML file, for example recipes/cpu.yaml."
    form = "a study as name: value lines (model, tasks, methods, seeds, settings)"
    content = read_yaml(path, missing=missing, mend=f"write {form}", expected=form)
    return make_study({"about": _opening_comment(path.read_text(encoding="utf-8"))} | content, path.stem)


def _opening_comment(text: str) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ").rstrip() for line in lines)


def make_study(content: Mapping[str, Any], name: str) -> Study:
    """A study from plain values; `name` where they give none.

    Raises:
        UserError: a value that cannot work; the sentence names it.
    """
    known = ({f.name for f in fields(Study)} - {"variants", "of_tasks"}) | {"methods", "method_settings"}
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}."
            if key in DEFAULTS:
                hint = "put it under settings."
            raise UserError(f"The study {name} names {key!r}, which it cannot have; {hint}")
    for key in ("model", "tasks", "methods"):
        if not content.get(key):
            raise UserError(f"The study {name} lacks {key}; name {'it' if key == 'model' else 'at least one'}.")
    of_tasks = tasks_in(content["tasks"])
    tasks = tuple(of_tasks)
    settings = settings_in("settings", content.get("settings"))
    samples = whole("samples", content.get("samples", 10), 0)
    of_method = {
        m: settings_in(f"method_settings of {m}", v) for m, v in mapping_in(content, "method_settings").items()
    }
    for method in of_method:
        if method not in METHODS:
            raise UserError(f"method_settings names {method!r}; the methods are {', '.join(METHODS)}.")
    shift = {str(task): texts_in(f"shift of {task}", others) for task, others in mapping_in(content, "shift").items()}
    for task in shift:
        if task not in tasks:
            raise UserError(f"shift names {task}, which is not trained on; add it to tasks.")
    limits = {name: content.get(name) for name in ("test_rows", "shift_rows")}
    name = str(content.get("name", name))
    if Path(name).name != name or name in ("", "..") or not name.isprintable():
        raise UserError(f"The study is called {name!r}, but its directory is named after it; choose a plain name.")
    study = Study(
        name=name,
        model=str(content["model"]),
        tasks=tasks,
        shift=shift,
        variants=tuple(variants_in(content["methods"], settings, of_method, samples)),
        seeds=seeds_in(content.get("seeds", [0])),
        samples=samples,
        **{name: None if limit is None else whole(name, limit, 1) for name, limit in limits.items()},
        validation_rows=whole("validation_rows", content.get("validation_rows", 300), 1),
        predict_batch_size=whole("predict_batch_size", content.get("predict_batch_size", 8), 1),
        settings=settings,
        about=str(content.get("about", "")),
        results=Path(str(content["results"])) if content.get("results") else None,
        typos=rates_in(content.get("typos", [])),
        of_tasks=of_tasks,
    )
    _check(study)
    return study


def _check(study: Study) -> None:
    names = [variant.name for variant in study.variants]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two methods are called {name!r}; give one of them a name of its own.")
        if TEMPERED in name:
            raise UserError(f"The name {name!r} holds {TEMPERED!r}, which marks tempered rows; choose another.")
    for task in study.tasks:
        source = study.task(task).chosen_on
        if source is not None and (source not in study.tasks or study.task(source).chosen_on is not None):
            raise UserError(f"chosen_on of {task} names {source}, which is no task that tries settings itself.")
        for variant in study.variants:
            lacking = source is not None and variant.tried and not study.runs_on(variant, source)
            if lacking and study.runs_on(variant, task):
                raise UserError(f"{variant.name} runs on {task}, but not on {source}, where its settings are chosen.")
    for variant in study.variants:
        if METHODS[variant.method].members and len(study.seeds_of(variant)) < 2:
            raise UserError("An ensemble is made of the seeds' runs, but there is one seed; give two or more.")
        if variant.members is not None and len(study.seeds_of(variant)) < variant.members:
            raise UserError(f"{variant.name} has more members than there are seeds; give it seeds of its own.")
        for task in variant.tasks or ():
            if task not in study.tasks:
                raise UserError(f"tasks of {variant.name} names {task}, which is not trained on; add it to tasks.")
        for task in study.tasks:
            for point in variant.tried or ({},):
                study.training_settings(variant, task, study.seeds[0], point)
