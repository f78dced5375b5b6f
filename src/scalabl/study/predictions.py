"""What a prediction cell holds: log class probabilities of every particle, and labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.core.files import sha256
from scalabl.study.cells import Cell, finished

PREDICTIONS = "predictions.safetensors"
VALIDATION = "validation"
UNLABELLED = -1


@dataclass(frozen=True)
class Predictions:
    """Each part is log class probabilities (N, n, C) and labels (n,), `UNLABELLED` where a row has none.

    Attributes:
        validation: of the rows that a temperature is fitted on.
        tests: name of a test set -> of its rows; the task's own comes first.
    """

    validation: tuple[Tensor, Tensor]
    tests: dict[str, tuple[Tensor, Tensor]]


def read_predictions(cell: Cell, output: Path) -> Predictions:
    """The predictions of a finished cell.

    Raises:
        UserError: the file is missing or was altered.
    """
    path, done = cell.directory(output) / PREDICTIONS, finished(output, cell.address)
    altered = UserError(f"{path} is missing or was altered; delete {path.parent} and run the benchmark again.")
    if done is None or not path.is_file() or sha256(path) != done["sha256"]:
        raise altered
    try:
        tensors = load_file(path)
    except SafetensorError:
        raise altered from None

    def part(name: str) -> tuple[Tensor, Tensor]:
        log_probs, labels = (tensors.get(f"{name}|{what}", torch.empty(0)) for what in ("log_probs", "labels"))
        whole = log_probs.ndim == 3 and log_probs.is_floating_point() and not log_probs.isnan().any()
        fits = labels.dtype == torch.int64 and len(labels) > 0 and labels.shape == log_probs.shape[1:2]
        if not whole or not fits or not UNLABELLED <= int(labels.min()) <= int(labels.max()) < log_probs.shape[2]:
            raise altered
        return log_probs, labels

    return Predictions(part(VALIDATION), {name: part(f"test:{name}") for name in cell.settings["test_sets"]})
