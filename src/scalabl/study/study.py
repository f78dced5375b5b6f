"""A study: what is compared with what, on which data, how often. Imports no torch.

# Which question it answers, in the comment that the file begins with; it stands above the tables.
model: smollm2-135m-instruct
results: docs/results/mine               where its tables and pictures go; runs/benchmark/NAME if left out
tasks: [openbookqa]                      trained and tested on
shift: {openbookqa: [arc-easy]}          trained on -> tested on as well
methods:                                 a name, or a mapping with a name, settings and a grid of its own
  - mle
  - {method: blob, name: blob mean, samples: 0}
  - {method: scalabl, name: scalabl linearized, predictive: linearized}     mc if left out, or auto
  - {method: scalabl, grid: {r: [4, 8, 16]}}
seeds: [0, 1, 2]
samples: 10                              particles
test_rows: 500                           of a task's test split; the same ones for everybody
shift_rows: 200                          of each shifted set
validation_rows: 300                     for temperatures and the choice of scoring
predict_batch_size: 8
settings: {steps: 200, layers: "last:8"}                 of every training run (the fields of `scalabl train`)
method_settings: {map: {weight_decay: 0.01}}             of one method's runs

What is more particular wins: settings, then the method's own defaults, method_settings, and those of a variant.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.files import read_yaml
from scalabl.runs.registry import BASELINE, METHODS, POST_HOC, SETTINGS
from scalabl.runs.settings import DEFAULTS, Settings, make_settings, typed_setting

TEMPERED = "+temperature"
# decided by the study, not by settings
_RESERVED = ("model", "data", "method", "seed", "validation_rows")
_PREDICTIVES = ("mc", "linearized", "auto")
# settings that no plain LoRA reads: kept at their defaults there, so that equal runs have equal addresses
_OF_POSTERIORS = (
    "variational_learning_rate", "beta", "schedule", "kl_warmup", "covariance", "prior_std", "init_sigma", "unit_rows",
    "prior_mean", "empirical_prior", "draws", "kl", "stochastic_modules", "stochastic_layers",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own: one line of the table.

    Attributes:
        name: as in the table.
        method: one of `scalabl.runs.registry.METHODS`, without "temperature".
        settings: of its training run, over those that all share.
        samples: particles; 0 is the mean.
        family: its name without its point of a grid.
        point: setting -> its value in the grid; empty where there is no grid.
        without_grid: the settings that the family would have without one.
        predictive: of ScalaBL, "mc", "linearized" or "auto"; "mc" is every other method's own.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    samples: int
    family: str
    point: Mapping[str, Any]
    without_grid: Mapping[str, Any]
    predictive: str = "mc"

    @property
    def trained_method(self) -> str:
        """The method of its training run: a post-hoc method is fitted on an MLE run."""
        return BASELINE if self.method in POST_HOC else self.method


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

    def training_settings(self, variant: Variant, task: str, seed: int) -> Settings:
        """The training run of a variant.

        Raises:
            UserError: a setting that does not exist or is out of range.
        """
        values = {
            **variant.settings,
            "model": self.model,
            "data": task,
            "method": variant.trained_method,
            "seed": seed,
            "validation_rows": self.validation_rows,
        }
        try:
            training = make_settings(values)
        except UserError as error:
            raise UserError(f"{variant.name}: {error}") from error
        if not METHODS[training.method].variational:
            training = training.changed(**{name: DEFAULTS[name] for name in _OF_POSTERIORS})
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
    known = ({f.name for f in fields(Study)} - {"variants"}) | {"methods", "method_settings"}
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
    tasks = _texts("tasks", content["tasks"])
    settings = _settings("settings", content.get("settings"))
    samples = _whole("samples", content.get("samples", 10), 0)
    of_method = {m: _settings(f"method_settings of {m}", v) for m, v in _mapping(content, "method_settings").items()}
    for method in of_method:
        if method not in METHODS:
            raise UserError(f"method_settings names {method!r}; the methods are {', '.join(METHODS)}.")
    shift = {str(task): _texts(f"shift of {task}", others) for task, others in _mapping(content, "shift").items()}
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
        variants=tuple(_variants(content["methods"], settings, of_method, samples)),
        seeds=_seeds(content.get("seeds", [0])),
        samples=samples,
        **{name: None if limit is None else _whole(name, limit, 1) for name, limit in limits.items()},
        validation_rows=_whole("validation_rows", content.get("validation_rows", 300), 1),
        predict_batch_size=_whole("predict_batch_size", content.get("predict_batch_size", 8), 1),
        settings=settings,
        about=str(content.get("about", "")),
        results=Path(str(content["results"])) if content.get("results") else None,
    )
    _check(study)
    return study


def _variants(
    entries: Any, settings: Mapping[str, Any], of_method: Mapping[str, Mapping[str, Any]], samples: int
) -> list[Variant]:
    found: list[Variant] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        own = dict(entry) if isinstance(entry, dict) else {"method": entry}
        method = str(own.pop("method", own.get("name")))
        if method not in METHODS:
            close = difflib.get_close_matches(method, METHODS, n=1)
            raise UserError(
                f"There is no method {method!r}{f'; did you mean {close[0]}?' if close else '.'} The methods are "
                f"{', '.join(METHODS)}."
            )
        # every method is reported with a temperature beside it: MLE's is the row that this name asks for
        if method == "temperature":
            method = BASELINE
        name, number = str(own.pop("name", method)), _whole("samples", own.pop("samples", samples), 0)
        predictive = _predictive(name, method, number, own.pop("predictive", "mc"))
        grid = own.pop("grid", {}) or {}
        if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
            raise UserError(f"grid of {name} must name settings with lists of values, for example r: [4, 8, 16].")
        trained = BASELINE if method in POST_HOC else method
        shared = {**settings, **SETTINGS.get(trained, {}), **of_method.get(trained, {}), **of_method.get(method, {})}
        for point in itertools.product(*grid.values()):
            chosen = dict(zip(grid, point, strict=True))
            base = _settings(name, {**shared, **own})
            # nothing named is all: modules, rows
            label = ", ".join(f"{k}={'all' if v is None else v}" for k, v in chosen.items())
            full = _settings(name, {**base, **chosen})
            variant = Variant(f"{name} {label}".strip(), method, full, number, name, chosen, base, predictive)
            if variant not in found:
                found.append(variant)
    return found


def _predictive(name: str, method: str, samples: int, given: Any) -> str:
    if given not in _PREDICTIVES:
        raise UserError(f"predictive of {name} is {given!r}; it must be one of {', '.join(_PREDICTIVES)}.")
    if given != "mc" and not METHODS[method].over_s:
        raise UserError(
            f"predictive of {name} is {given}, which is of scalabl alone; {method} has its own, leave it out."
        )
    if given != "mc" and samples == 0:
        raise UserError(f"{name} has samples 0, the mean, and predictive {given}; leave out one of the two.")
    return str(given)


def _check(study: Study) -> None:
    names = [variant.name for variant in study.variants]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two methods are called {name!r}; give one of them a name of its own.")
        if TEMPERED in name:
            raise UserError(f"The name {name!r} holds {TEMPERED!r}, which marks tempered rows; choose another.")
    for variant in study.variants:
        if METHODS[variant.method].members and len(study.seeds) < 2:
            raise UserError("An ensemble is made of the seeds' runs, but there is one seed; give two or more.")
        study.training_settings(variant, study.tasks[0], study.seeds[0])


def _settings(where: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict | None):
        raise UserError(f"{where} must be a mapping of settings, name: value.")
    for name in values or {}:
        if name in _RESERVED:
            raise UserError(f"{where} sets {name}, which the study itself decides; give it at the study's top level.")
    return dict(values or {})


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{key} must be a mapping, name: values.")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(item, str) for item in listed):
        raise UserError(f"{name} must be a list of names, for example [arc-easy, openbookqa].")
    return tuple(dict.fromkeys(listed))


def _seeds(value: Any) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise UserError("seeds is empty; give at least one.")
    return tuple(dict.fromkeys(_whole("a seed", seed, 0) for seed in listed))


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}; it must be a whole number, at least {least}.")
    return value


@dataclass(frozen=True)
class Axis:
    """One setting of a grid.

    Attributes:
        setting: its name in a recipe.
        values: in the recipe's order.
        default: the place of the value that the family would have without its grid; None where it is not among them.
    """

    setting: str
    values: tuple[Any, ...]
    default: int | None


@dataclass(frozen=True)
class Grid:
    """The variants of one entry of `methods` with a grid.

    Attributes:
        family: the entry's name.
        axes: its settings.
        variants: place on each axis -> variant.
    """

    family: str
    axes: tuple[Axis, ...]
    variants: Mapping[tuple[int, ...], Variant]

    @property
    def default(self) -> Variant | None:
        """The variant with every setting at its default, if there is one."""
        place = [axis.default for axis in self.axes]
        return self.variants.get(tuple(p for p in place if p is not None)) if None not in place else None


def grids(study: Study) -> list[Grid]:
    """The grids of a study, in its order."""
    families: dict[str, list[Variant]] = {}
    for variant in study.variants:
        if variant.point:
            families.setdefault(variant.family, []).append(variant)
    return [_grid(family, variants) for family, variants in families.items()]


def _grid(family: str, variants: list[Variant]) -> Grid:
    without = variants[0].without_grid
    axes = []
    for name in variants[0].point:
        values = tuple(dict.fromkeys(typed_setting(name, variant.point[name]) for variant in variants))
        default = typed_setting(name, without[name]) if name in without else DEFAULTS[name]
        axes.append(Axis(name, values, values.index(default) if default in values else None))
    places = {
        tuple(axis.values.index(typed_setting(axis.setting, variant.point[axis.setting])) for axis in axes): variant
        for variant in variants
    }
    return Grid(family, tuple(axes), places)
