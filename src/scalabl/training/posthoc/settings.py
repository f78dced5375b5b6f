"""The adapter that is to be made Bayesian, checked before anything heavy is imported.

What decides a posterior that is fitted to a finished adapter. Imports nothing heavy.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.files import require_place
from scalabl.core.locations import expanded, real_path
from scalabl.data.assemble import TrainingRows, select_rows
from scalabl.data.example import Example, Task
from scalabl.data.load import load_task, with_labels
from scalabl.runs.directory import adapter_config, as_recorded, find_base
from scalabl.runs.record import CONFIG, HEAD, RunRecord
from scalabl.runs.settings import LARGEST, RowSettings, Settings, typed_setting
from scalabl.runs.stock import find_record, is_stock

# ways of drawing A and B that take the draw out of the base's weights: the adapter fits no base that can be loaded
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# options that say nothing about the finished weights
_INERT = {
    "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config",
}  # fmt: skip


@dataclass(frozen=True)
class SourceAdapter:
    """A plain LoRA on disk.

    Attributes:
        directory: `adapter_config.json` and `adapter_model.safetensors`.
        config: the former's content.
        record: the run's record, where `scalabl train` made it; what its files say, where it has a head.
        model: the base model, a directory or a name.
    """

    directory: Path
    config: dict[str, Any]
    record: RunRecord | None
    model: str

    @property
    def has_head(self) -> bool:
        """Whether it is of a model with a classification head."""
        return self.record is not None and self.record.scoring.get("scoring") == HEAD

    @property
    def trained_here(self) -> RunRecord | None:
        """The record of a run, which knows the rows that it was trained on."""
        return None if self.record is None or is_stock(self.record) else self.record


def read_source(directory: Path, model: str | None = None, labels: Sequence[str] | None = None) -> SourceAdapter:
    """Check an adapter directory.

    Args:
        directory: made by PEFT's `save_pretrained`, or a finished run of plain LoRA.
        model: the base model; by default the one that the run or the adapter names.
        labels: of a classification head, in the order of its outputs, where no file says them.

    Raises:
        UserError: files are missing, altered or not finished; it is no plain LoRA; its base model is not named; labels
            of a head are not known, or were given without one.
    """
    config = adapter_config(directory, "PEFT's save_pretrained")
    kind = config.get("peft_type")
    if kind == "SCALABL":
        raise UserError(f"{directory} has a posterior already; give a plain LoRA (its mean/ is one).")
    if kind != "LORA":
        raise UserError(f"{directory} holds an adapter of type {kind}, but only a plain LoRA can be made Bayesian.")
    if config.get("task_type") not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise UserError(
            f"{directory} was trained for {config['task_type']}, but only CAUSAL_LM and SEQ_CLS are supported."
        )
    if config.get("use_dora"):
        raise UserError(f"{directory} is a DoRA, whose norms depend on the weights; only a plain LoRA is supported.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise UserError(
            f"{directory} was started with init_lora_weights={start!r}, which changes the base model's weights; "
            "convert it to a plain LoRA first (path_initial_model_for_weight_conversion of save_pretrained)."
        )
    record = find_record(directory, labels=labels, model=model)
    if labels is not None and record is None:
        raise UserError(f"labels are of a classification head, and {directory} has none; leave them out.")
    if labels is not None and record is not None and tuple(labels) != record.labels:
        raise UserError(f"labels are the run's own, {', '.join(record.labels or ())}; leave them out.")
    named = model or (record.model if record else config.get("base_model_name_or_path"))
    if not named:
        raise UserError(f"{directory / CONFIG} does not name the base model; give it with --model.")
    named = named if model else find_base(named, directory)
    if named.startswith((".", "/", "~")) and not expanded(named).is_dir():
        raise UserError(f"There is no model directory {named}; give the base model with --model.")
    return SourceAdapter(directory, config, record, as_recorded(named))


def refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse options of LoRA that a ScalaBL adapter cannot carry, where they are set.

    Raises:
        UserError: the first of them.
    """
    for name, value in options.items():
        if value and name not in _INERT:
            raise UserError(f"The adapter uses LoRA's option {name}, which cannot be made Bayesian; train without it.")


def rows_for(
    source: SourceAdapter, data: str, train_rows: int | None = None
) -> tuple[Task, tuple[Example, ...], tuple[Example, ...]]:
    """The task, the rows that the posterior is fitted on, and the held-out rows. A run's own are those that it was
    trained on, and those that it held out. Of other data, and of an adapter whose training nobody knows, they are the
    train split and, as many as a run holds out, the validation split: rows of one file may all have been trained on.

    Args:
        source: the adapter; a run's class words become the rows' choices.
        data: a benchmark's name, a JSONL file, or a directory of them; where it has no train split, the posterior is
            fitted on the first that it has, and no rows are held out.
        train_rows: take so many, the same ones every time.

    Raises:
        UserError: no such data, bad rows, or other labels than the run's.
    """
    if train_rows is not None and train_rows < 1:
        raise UserError(f"--train-rows is {train_rows}; it must be at least 1.")
    task = load_task(data)
    labels = source.record.labels if source.record else task.labels
    if own := _own_rows(source, task, data):
        fitted, others = own.train, own.validation
    elif {"train", "validation"} <= task.splits.keys():
        chosen = select_rows(task, RowSettings())
        fitted, others = chosen.train, chosen.validation
    else:
        fitted, others = next(task.splits[name] for name in _FITTED_ON if name in task.splits), ()
    rows, held_out = with_labels(fitted, labels, data), with_labels(others, labels, data)
    if any(row.target is None for row in rows):
        raise UserError(f"{data} has rows without an answer; a posterior is fitted on labelled rows.")
    if train_rows is not None and train_rows < len(rows):
        rows = random.Random(0).sample(rows, train_rows)
    return task, tuple(rows), tuple(held_out)


_FITTED_ON = ("train", "validation", "test")


def _own_rows(source: SourceAdapter, task: Task, data: str) -> TrainingRows[Example] | None:
    """What the adapter's run took of these data, where they are its own: by what they hold, wherever they lie now."""
    own = source.trained_here
    if own is None or "train" not in task.splits:
        return None
    try:
        taken = select_rows(task, own.row_settings)
    except UserError:  # they are no rows that the run can have had
        return None
    if not own.took(taken.train, taken.validation):
        return None
    told = own.held_out_sha256 is not None and taken.validation  # a digest of rows; else by where they lie
    there = real_path(expanded(str(own.recipe["data"]))) == real_path(expanded(data))
    return taken if told or there else None


def require_free(output: Path) -> None:
    """Refuse an output directory that is not empty or cannot be written.

    Raises:
        UserError: so it is.
    """
    if output.is_symlink():
        where = "" if output.exists() else " to nowhere"
        raise UserError(f"{output} is a link{where}; remove it, or choose another --output.")
    if not output.name:
        raise UserError(f"{output} is the directory that the command is called in; choose another --output.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty; choose another --output.")
    require_place(output.parent, named=output)


METHODS = ("laplace", "vi")
STRUCTURES = ("joint", "layer", "diagonal")
# settings of a run that its adapter keeps; how it was trained is over
_KEPT = (
    "r", "lora_alpha", "target_modules", "layers", "scoring", "normalization", "chat", "max_length", "seed", "dtype",
    "bits", "quantization", "template",
)  # fmt: skip
# of strengths relative to the adapter's own, which begin at 1: not that of a training, which begins elsewhere
_PRIOR = {"prior_mean": 0.0, "prior_std": 1.0, "init_sigma": 0.05}
_VARIATIONAL = {"steps", "variational_learning_rate", "prior_std", "init_sigma", "schedule", "beta"}


@dataclass(frozen=True)
class PosthocSettings:
    """What decides the posterior.

    Attributes:
        method: "laplace" or "vi".
        training: scoring, batch size and precision of the model; for "vi" steps, rates and the prior too.
        structure: which correlations Laplace's covariance keeps: "joint", "layer" or "diagonal".
        prior_precision: Laplace's, on relative strengths; None takes the one of the highest evidence, or the multiple
            of it under which held-out rows have the lowest NLL.
        scoring_given: whether the scoring was given, so that it wins over the run's own.

    Raises:
        UserError: a value out of its range, or one that the method does not read.
    """

    method: str
    training: Settings
    structure: str = "joint"
    prior_precision: float | None = None
    scoring_given: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (("method", self.method, METHODS), ("structure", self.structure, STRUCTURES)):
            if value not in choices:
                raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        precision = self.prior_precision
        if precision is not None and not 0 < precision <= LARGEST:
            raise UserError(f"prior_precision is {precision}; it must be a positive number, at most {LARGEST:g}.")
        if self.method == "vi" and (precision is not None or self.structure != "joint"):
            raise UserError("prior_precision and structure belong to laplace; leave them out for vi.")


def settings_for(
    source: SourceAdapter,
    data: str,
    method: str = "laplace",
    *,
    structure: str = "joint",
    prior_precision: float | None = None,
    **given: Any,
) -> PosthocSettings:
    """The settings of a posterior: the source run's own where it has one, else what the adapter's configuration says.

    Args:
        source: the adapter.
        data: what the posterior is fitted on.
        method: "laplace" or "vi".
        structure: see `PosthocSettings`.
        prior_precision: see `PosthocSettings`.
        given: settings of a training; None leaves one as it is.

    Raises:
        UserError: a value out of its range, or one that the method does not read.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if source.record:
        settings = {name: value for name, value in source.record.recipe.items() if name in _KEPT}
    else:
        targets = source.config.get("target_modules") or "all-linear"
        settings = {
            **{name: typed_setting(name, source.config[name]) for name in ("r", "lora_alpha")},
            "target_modules": targets if isinstance(targets, str) else ",".join(sorted(targets)),
        }
    if source.has_head and (other := named.pop("scoring", HEAD)) not in (HEAD, "auto"):
        raise UserError(f"{source.directory} has a classification head, which has no {other}; leave out scoring.")
    if source.has_head and "template" in named:
        raise UserError(f"{source.directory} has a classification head, which has no prompt; leave out template.")
    if (
        source.trained_here
        and "scoring" not in named
        and (unread := sorted(named.keys() & {"chat", "max_length", "template"}))
    ):
        raise UserError(f"{unread[0]} belongs to a scoring, and a run keeps its own; name one with --scoring too.")
    if method == "laplace" and (unread := sorted(named.keys() & _VARIATIONAL)):
        raise UserError(f"{unread[0]} belongs to vi; leave it out for laplace, which takes one pass over the rows.")
    covariance = "full" if method == "laplace" else "diagonal"
    settings |= {"method": "scalabl", "model": source.model, "data": data, "covariance": covariance} | _PRIOR
    return PosthocSettings(method, Settings.flat(**settings | named), structure, prior_precision, "scoring" in named)
