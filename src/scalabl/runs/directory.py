"""A run's directory: `scalabl.json` says what it is, whether it is finished, and what its adapter must hash to.

DIR/scalabl.json                 recipe, task, scoring, versions, status, sha256 of the adapter
DIR/adapter_model.safetensors    the adapter, with adapter_config.json
DIR/mean/                        a plain LoRA of the posterior mean (method scalabl)
DIR/joint_covariance.safetensors    covariance between layers (scalabl bayesianize)
DIR/training_log.json            what the trainer logged
DIR/checkpoints/                 while it runs
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, JOINT, read_json, require_place, sha256

RECORD = "scalabl.json"
CHOICES, LANGUAGE = "choices", "language"  # kinds of runs: questions with choices, rows of text


def read_record(directory: Path) -> dict[str, Any]:
    """The record of a run.

    Raises:
        UserError: the directory is not a run of this program, or its record cannot be read.
    """
    path = directory / RECORD
    if not directory.is_dir():
        raise UserError(f"There is no run directory {directory}; make one with scalabl train --output {directory}.")
    mend = "train the run again or restore the file"
    missing = f"{directory} holds no {RECORD}, so it is no run; make one with scalabl train."
    return read_json(path, missing=missing, mend=mend, holds=f"a run's record; {mend}", key="recipe")


def finished_record(directory: Path) -> dict[str, Any]:
    """The record of a finished run whose adapter is what was written.

    Raises:
        UserError: not a run, not finished, or the adapter was truncated or altered.
    """
    record = read_record(directory)
    if record.get("status") != "finished":
        raise UserError(f"The run in {directory} is not finished; run the same scalabl train again to resume it.")
    adapter = directory / ADAPTER
    if not adapter.is_file():
        raise UserError(f"{directory} has lost its {ADAPTER}; restore the file or train the run again.")
    if sha256(adapter) != record.get("adapter_sha256"):
        raise UserError(
            f"{adapter} was truncated or altered (its sha256 is not the one in {RECORD}); restore the file or train "
            "the run again."
        )
    joint = record.get("joint_sha256")
    if joint is not None and (not (directory / JOINT).is_file() or sha256(directory / JOINT) != joint):
        raise UserError(f"{directory / JOINT} was lost or altered; restore the file or call scalabl bayesianize again.")
    return record


def classifier_record(directory: Path) -> dict[str, Any]:
    """The record of a finished run that was trained on questions with choices.

    Raises:
        UserError: not a finished run, altered files, or one that was trained on rows of text.
    """
    record = finished_record(directory)
    if record.get("kind", CHOICES) != CHOICES:
        raise UserError(
            f"{directory} was trained on rows of text, so it has no choices to score; use scalabl generate {directory}."
        )
    return record


def claim(
    directory: Path, recipe: dict[str, Any], defaults: Mapping[str, Any] | None = None, processes: int = 1
) -> bool:
    """Make a directory ready for a run; True if it already holds this very run, finished.

    A run of other processes is the same one where batch size, accumulation and processes make the same rows a step.

    Args:
        directory: the run's.
        recipe: its settings.
        defaults: what a setting was before there was one: a record that lacks it was made with this.
        processes: how many train.

    Raises:
        UserError: it holds another run or other files, or cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; choose another --output.")
    if (directory / RECORD).exists():
        record = read_record(directory)
        before = {**(defaults or {}), **record["recipe"]}
        different = [name for name, value in recipe.items() if before.get(name) != value]
        trained_by = record.get("processes", 1)
        if processes != trained_by:
            _require_same_rows(directory, before, trained_by, recipe, processes)
            different = [name for name in different if name not in _CUT]
        if different:
            name = different[0]
            raise UserError(
                f"{directory} holds another run ({name} was {before.get(name)}, now {recipe[name]}); "
                "choose another --output or delete it."
            )
        return record.get("status") == "finished"
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty and holds no run; choose another --output.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}); choose another --output.") from error
    require_place(directory)
    return False


def hold(directory: Path) -> int | None:
    """Keep a second call from training into a run's directory for as long as this process holds it.

    The lock is on the directory itself, so that nothing is left of it when the process is killed.

    Returns:
        the open directory, closing which lets go of it; None where the system has no such locks.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    held = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise UserError(
            f"Another call trains into {directory}; wait for its end, or choose another --output."
        ) from None
    except OSError:  # a file system without locks
        os.close(held)
        return None
    return held


_CUT = ("batch_size", "gradient_accumulation")  # how the rows of a step are cut, beside the processes


def _require_same_rows(
    directory: Path, before: Mapping[str, Any], trained_by: int, now: Mapping[str, Any], processes: int
) -> None:
    was, wanted = (math.prod(recipe[name] for name in _CUT) for recipe in (before, now))
    was, wanted = was * trained_by, wanted * processes
    if was != wanted:
        cut = f"batch_size {now['batch_size']} x gradient_accumulation {now['gradient_accumulation']}"
        raise UserError(
            f"{directory} holds a run of {was} rows a step (in {trained_by} processes), but {cut} x {processes} "
            f"processes are {wanted}; choose a batch size that makes {was}, or another --output."
        )
