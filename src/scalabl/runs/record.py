"""The record of a run: what it is, whether it is finished, and what its adapter must hash to. Imports no torch.

It lies as `scalabl.json` in the run's directory, written whole or not at all, with the settings flat under "recipe".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

from scalabl.core import __version__, processes
from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, JOINT, read_json, sha256, write_json
from scalabl.data.example import Example, rows_digest
from scalabl.runs.registry import METHODS
from scalabl.runs.settings import BEFORE, DEFAULTS, RowSettings, Settings, typed_setting

RECORD = "scalabl.json"
CONFIG = "adapter_config.json"
VERSION = 1  # of the record's form; records without one are of the first
HEAD = "head"  # the scoring by a classification head
SEVERAL_LABELS = "multi_label_classification"  # Transformers' problem_type of a head whose rows may have several
CHOICES, LANGUAGE = "choices", "language"  # kinds of runs: questions with choices, rows of text
_SCORINGS = ("letters", "continuation", "text", HEAD)
_MEND = "train the run again or restore the file"


def config_digest(directory: Path) -> str:
    """SHA-256 of what an adapter's configuration says, but for where its base model lies.

    Raises:
        UserError: there is none, or it is no JSON.
    """
    path = directory / CONFIG
    missing = f"{directory} has lost its {CONFIG}; restore the file or train the run again."
    said = read_json(path, missing=missing, mend="restore the file", expected="an adapter's configuration")
    whole = json.dumps({**said, "base_model_name_or_path": None}, sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _check(said: dict[str, Any], path: Path) -> None:
    """Refuse values that no record has, by the names of their fields."""
    kinds = get_type_hints(RunRecord)
    for name, value in said.items():
        if not is_of(value, kinds[name]):
            raise UserError(f"{path}: {name} is {str(value)[:80]!r}, which no record has; {_MEND}.")
    for name, choices in (("status", ("running", "finished")), ("kind", (CHOICES, LANGUAGE))):
        if said.get(name, choices[0]) not in choices:
            raise UserError(f"{path}: {name} is {said[name]!r}; it must be {' or '.join(choices)}; {_MEND}.")
    for name, value in said["recipe"].items():
        if name in DEFAULTS and (value is not None or name in ("method", "model")):
            try:
                typed_setting(name, value)
            except UserError as error:
                raise UserError(f"{path}: {str(error).rstrip('.')}; {_MEND}.") from error
    if (method := said["recipe"].get("method", DEFAULTS["method"])) not in METHODS:
        raise UserError(f"{path}: method is {repr(method)[:80]}; it must be one of {', '.join(METHODS)}; {_MEND}.")
    if "scoring" in said and said["scoring"].get("scoring", HEAD) not in _SCORINGS:
        raise UserError(f"{path}: scoring is {said['scoring']['scoring']!r}; it must be one of {', '.join(_SCORINGS)}.")


def is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type as the record's fields have them; a whole number is a float too."""
    if is_typeddict(kind):
        inner = get_type_hints(kind)
        return isinstance(value, dict) and all(name in value and is_of(value[name], inner[name]) for name in inner)
    origin, inside = get_origin(kind), get_args(kind)
    if origin is dict:
        return isinstance(value, dict) and all(is_of(each, inside[1]) for each in value.values())
    if origin is list:
        return isinstance(value, list) and all(is_of(each, inside[0]) for each in value)
    if inside:  # or None
        return any(is_of(value, each) for each in inside)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


class TaskFacts(TypedDict):
    """Where the rows are from, and the class words that they share, if they do."""

    name: str
    source: str
    licence: str
    labels: list[str] | None


class RowCounts(TypedDict):
    """Rows that were trained on, and rows that were held out."""

    train: int
    validation: int


@dataclass(frozen=True)
class RunRecord:
    """What `scalabl.json` says of a run.

    Attributes:
        recipe: its settings, flat; those that are younger than the record have their defaults.
        status: "running" or "finished".
        kind: `CHOICES` or `LANGUAGE`.
        task, rows: what it was trained on.
        scoring, scoring_name: how a row is scored, as settings and in words.
        scoring_nll: each scoring's NLL on held-out rows, where one was chosen.
        parameters: numbers of parameters: base, lora, variational.
        base_fingerprint: of the base model's weights.
        versions: of the libraries.
        device, processes: where it was trained.
        tokens: of rows of text: trained, all, cut_rows.
        class_counts: of labels that rows share: how many training rows each has.
        warnings: sentences.
        predictive: by which the run is to be read where nothing else is named; None for its method's own.
        bayesianized: how its posterior was fitted to a finished adapter, where it was.
        calibration: the posterior's scale and the temperature, fitted on held-out rows
            (`scalabl.inference.calibration`); None of an uncalibrated run.
        adapter_sha256, joint_sha256, features_sha256: of the files, once they are written, where there are such.
        config_sha256: of what the adapter's configuration says (`config_digest`); None of older versions.
        held_out_sha256: of the validation rows (`scalabl.data.example.rows_digest`); None of older versions, of rows of
            text, and of a posterior that was fitted to a finished adapter on other rows than its run's own.
        trained_sha256: of the training rows, alike; None of older versions, and of a posterior that was fitted.
        scalabl, version: of the program, and of the record's form.
    """

    recipe: dict[str, Any]
    scalabl: str = __version__
    version: int = VERSION
    status: str = "running"
    kind: str = CHOICES
    task: TaskFacts = field(default_factory=lambda: TaskFacts(name="", source="", licence="", labels=None))
    rows: RowCounts = field(default_factory=lambda: RowCounts(train=0, validation=0))
    scoring: dict[str, Any] = field(default_factory=dict)
    scoring_name: str = ""
    scoring_nll: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    base_fingerprint: Any = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    processes: int = 1
    warnings: list[str] = field(default_factory=list)
    tokens: dict[str, int] | None = None
    class_counts: dict[str, int] | None = None
    predictive: str | None = None
    bayesianized: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    adapter_sha256: str | None = None
    joint_sha256: str | None = None
    features_sha256: str | None = None
    config_sha256: str | None = None
    held_out_sha256: str | None = None
    trained_sha256: str | None = None

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The record of a run.

        Raises:
            UserError: the directory is not a run of this program, or its record cannot be read.
        """
        path = directory / RECORD
        if not directory.is_dir():
            raise UserError(f"There is no run directory {directory}; make one with scalabl train --output {directory}.")
        missing = f"{directory} holds no {RECORD}, so it is no run; make one with scalabl train."
        holds = f"a run's record; {_MEND}"
        content = read_json(path, missing=missing, mend=_MEND, expected=holds, key="recipe")
        if not isinstance(content["recipe"], dict):
            raise UserError(f"{path} must hold {holds}.")
        if content.get("version", VERSION) != VERSION:
            raise UserError(f"{path} was written by scalabl {content.get('scalabl')}; read it with that version.")
        known = {each.name for each in fields(cls)}
        said = {name: value for name, value in content.items() if name in known and value is not None}
        _check(said, path)
        return cls(**said | {"recipe": DEFAULTS | BEFORE | content["recipe"]})

    @classmethod
    def read_finished(cls, directory: Path) -> Self:
        """The record of a finished run whose adapter is what was written.

        Raises:
            UserError: not a run, not finished, or the adapter was truncated or altered.
        """
        record = cls.read(directory)
        if not record.is_finished:
            raise UserError(f"The run in {directory} is not finished; run the same scalabl train again to resume it.")
        adapter, joint = directory / ADAPTER, directory / JOINT
        if not adapter.is_file():
            raise UserError(f"{directory} has lost its {ADAPTER}; restore the file or train the run again.")
        if sha256(adapter) != record.adapter_sha256:
            raise UserError(
                f"{adapter} was truncated or altered (its sha256 is not the one in {RECORD}); restore the file or "
                "train the run again."
            )
        if record.config_sha256 is not None and config_digest(directory) != record.config_sha256:
            raise UserError(
                f"{directory / CONFIG} was altered (its digest is not the one in {RECORD}); restore the file or train "
                "the run again."
            )
        if record.joint_sha256 is not None and (not joint.is_file() or sha256(joint) != record.joint_sha256):
            raise UserError(f"{joint} was lost or altered; restore the file or call scalabl bayesianize again.")
        return record

    @classmethod
    def read_classifier(cls, directory: Path) -> Self:
        """The record of a finished run that was trained on questions with choices.

        Raises:
            UserError: not a finished run, altered files, or one that was trained on rows of text.
        """
        record = cls.read_finished(directory)
        if record.kind != CHOICES:
            raise UserError(
                f"{directory} was trained on rows of text, so it has no choices to score; use scalabl generate "
                f"{directory}."
            )
        return record

    @classmethod
    def read_generating(cls, directory: Path) -> Self:
        """The record of a finished run that writes text.

        Raises:
            UserError: not a finished run, altered files, or one with a classification head, which has no next token.
        """
        record = cls.read_finished(directory)
        if record.scoring.get("scoring") == HEAD:
            raise UserError(
                f"{directory} was trained with a classification head, which writes no text; use scalabl predict "
                f"{directory}."
            )
        return record

    @classmethod
    def of_main(cls, work: Callable[[], Self]) -> Self:
        """The record that the main process's work returns, in every process.

        Raises:
            UserError: in every process, what the work raised in the main one.
        """
        return cls(**processes.on_main(lambda: work().as_dict()))

    def write(self, directory: Path) -> None:
        """Write it into the run's directory, whole or not at all."""
        write_json(directory / RECORD, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """What the file holds; what is not known or not there is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def is_finished(self) -> bool:
        """Whether the run is whole."""
        return self.status == "finished"

    @property
    def settings(self) -> Settings:
        """The settings that it was trained with.

        Raises:
            UserError: they are none that a training can have, as the 0 steps of a Laplace approximation.
        """
        return Settings.flat(**{name: self.recipe[name] for name in DEFAULTS})

    def took(self, train: Sequence[Example], held_out: Sequence[Example]) -> bool:
        """Whether these can be its rows: as many of each, and the very held-out ones where it kept their digest."""
        counts = {"train": len(train), "validation": len(held_out)}
        return counts == self.rows and self.held_out_sha256 in (None, rows_digest(held_out))

    @property
    def prediction_batch_size(self) -> int:
        """Rows at a time of predictions right after the training, by a machine that had memory for its batches."""
        return min(8, int(self.recipe["batch_size"]))

    @property
    def row_settings(self) -> RowSettings:
        """Which rows of its data it read, a Laplace approximation too."""
        return RowSettings(**{each.name: self.recipe[each.name] for each in fields(RowSettings)})

    @property
    def method(self) -> str:
        """The method that it was trained by."""
        return str(self.recipe["method"])

    @property
    def model(self) -> str:
        """The base model, a directory or a name."""
        return str(self.recipe["model"])

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The class words that its rows share, if they do."""
        labels = self.task["labels"]
        return None if labels is None else tuple(labels)

    @property
    def base_options(self) -> dict[str, Any]:
        """How the base model was loaded: keywords of `load_base`."""
        options = {name: self.recipe[name] for name in ("dtype", "bits", "quantization")}
        if self.scoring.get("scoring") != HEAD:
            return options
        return options | {"labels": self.scoring["labels"], "several": self.several}

    @property
    def several(self) -> bool:
        """Whether a row may have several of the labels, or none."""
        return bool(self.scoring.get("several"))
