"""A run's directory: whether it is free for a training, and kept from a second one meanwhile.

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
from scalabl.core.files import require_place
from scalabl.runs.record import RECORD, RunRecord
from scalabl.runs.settings import Settings


def claim(directory: Path, settings: Settings, processes: int = 1) -> bool:
    """Make a directory ready for a run; True if it already holds this very run, finished.

    A run of other processes is the same one where batch size, accumulation and processes make the same rows a step.

    Args:
        directory: the run's.
        settings: its own.
        processes: how many train.

    Raises:
        UserError: it holds another run or other files, or cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; choose another --output.")
    if (directory / RECORD).exists():
        record, now = RunRecord.read(directory), settings.as_dict()
        different = [name for name, value in now.items() if record.recipe.get(name) != value]
        if processes != record.processes:
            _require_same_rows(directory, record, now, processes)
            different = [name for name in different if name not in _CUT]
        if different:
            name = different[0]
            raise UserError(
                f"{directory} holds another run ({name} was {record.recipe[name]}, now {now[name]}); "
                "choose another --output or delete it."
            )
        return record.is_finished
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


def _require_same_rows(directory: Path, before: RunRecord, now: Mapping[str, Any], processes: int) -> None:
    was, wanted = (
        number * math.prod(recipe[name] for name in _CUT)
        for number, recipe in ((before.processes, before.recipe), (processes, now))
    )
    if was != wanted:
        cut = f"batch_size {now['batch_size']} x gradient_accumulation {now['gradient_accumulation']}"
        raise UserError(
            f"{directory} holds a run of {was} rows a step (in {before.processes} processes), but {cut} x {processes} "
            f"processes are {wanted}; choose a batch size that makes {was}, or another --output."
        )
