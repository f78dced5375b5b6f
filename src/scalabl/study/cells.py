"""A cell: a piece of work that is done once, in a directory named after everything that decides its outcome.

OUTPUT/cells/ADDRESS/settings.json    what the address is the SHA-256 of
OUTPUT/cells/ADDRESS/run/             training: a run directory
OUTPUT/cells/ADDRESS/posthoc/         post-hoc: what the method fitted
OUTPUT/cells/ADDRESS/predictions.safetensors    prediction: log class probabilities and labels
OUTPUT/cells/ADDRESS/outcomes.safetensors       and what they come to
OUTPUT/cells/ADDRESS/finished.json    written last: time, memory, machine
OUTPUT/cells/ADDRESS/failed.json      why it could not be done, if it could not
OUTPUT/cells/ADDRESS/log.txt          its standard error: bars, warnings, tracebacks

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError, safe_open

from scalabl.core.files import read_if_whole
from scalabl.runs.record import RowCounts, TaskFacts, is_of

TRAINING, POST_HOC, PREDICTION = "training", "posthoc", "prediction"
FORMAT = 1  # part of every address: raised when a cell's content changes its meaning
OUTCOMES = "outcomes.safetensors"
OUTCOMES_FORMAT = 2  # raised when what is in it changes its meaning
FACTS = "outcomes"  # all of its metadata
_DIGITS = 16
ELSEWHERE = "elsewhere"  # in finished.json


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        kind: "training", "posthoc" or "prediction".
        settings: everything that decides the outcome; cells that it needs are named in it by address.
        needs: addresses of cells that have to be finished first.
        label: for people, not part of the address.
    """

    kind: str
    settings: dict[str, Any] = field(hash=False)
    needs: tuple[str, ...]
    label: str = field(compare=False)

    @property
    def address(self) -> str:
        """The first 16 hex digits of the SHA-256 of kind and settings."""
        return address_of(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """What the address is made from."""
        return {"format": FORMAT, "kind": self.kind, **self.settings}

    def directory(self, output: Path) -> Path:
        """Where its files are."""
        return output / "cells" / self.address


def address_of(content: dict[str, Any]) -> str:
    """The address of a cell with this content (`settings.json`)."""
    return digest(content)[:_DIGITS]


def digest(content: Any) -> str:
    """SHA-256 of plain values, however their keys are ordered."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _Measured(TypedDict):
    seconds: float
    peak_memory: float
    wall: float
    device: str
    versions: str


class _Trained(_Measured):
    scoring: str
    parameters: dict[str, int]
    rows: RowCounts
    task: TaskFacts


class _Fitted(_Measured):
    extra_parameters: int


class _Predicted(_Measured):
    sha256: str
    rows_also_tuned_on: dict[str, int]


class _Losses(TypedDict):
    raw: float | None
    calibrated: float | None
    temperature: float | None


def finished(output: Path, address: str) -> dict[str, Any] | None:
    """What a finished cell measured; None for a cell that is not finished, or whose file is not what it wrote."""
    facts = _facts(output / "cells" / address / "finished.json")
    if facts is None:
        return None
    of_cell = _facts(output / "cells" / address / "settings.json") or {}
    kinds = {TRAINING: _Trained, POST_HOC: _Fitted, PREDICTION: _Predicted}
    possible = [kind for name, kind in kinds.items() if of_cell.get("kind", name) == name]
    if not any(is_of(facts, kind) for kind in possible):
        return None
    if not is_of(facts.get("validation_nll"), _Losses | None):  # older predictions lack it
        return None
    return facts if 0 < facts["seconds"] < math.inf and 0 <= facts["wall"] < math.inf else None


def place_of(facts: Mapping[str, Any]) -> tuple[str, str | None]:
    """The device, and which machine since it was started (cells of earlier versions do not say)."""
    return facts["device"], facts.get("machine")


def below_of(cells: Sequence[Mapping[str, Any]], place: tuple[str, str | None]) -> dict[str, Any]:
    """ "below", with the seconds in all and the most memory (MiB) of the cells that a prediction needs; nothing where
    one of them was done elsewhere than the prediction was."""
    if any(place_of(cell) != place for cell in cells):
        return {}
    seconds, peaks = zip(*((cell["seconds"], cell["peak_memory"]) for cell in cells), strict=True)
    return {"below": {"seconds": sum(seconds), "peak_memory": max(peaks)}}


def outcome_facts(path: Path) -> dict[str, Any]:
    """What stands beside the tensors of a file of outcomes; nothing where there is none of this format."""
    try:
        with safe_open(path, "numpy") as file:
            facts = json.loads((file.metadata() or {})[FACTS])
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) and facts.get("format") == OUTCOMES_FORMAT else {}


def is_elsewhere(facts: dict[str, Any] | None) -> bool:
    """Whether a cell was finished on another machine: its figures are here (`kept.py`), what it made is not."""
    return facts is not None and facts.get(ELSEWHERE) is True


def failure(output: Path, address: str) -> dict[str, Any] | None:
    """Why a cell failed when it was last tried, or None: {"error", "invocation"}, and "diverged" where
    training met a NaN."""
    facts = _facts(output / "cells" / address / "failed.json")
    return facts if facts is not None and isinstance(facts.get("error"), str) else None


def _facts(path: Path) -> dict[str, Any] | None:
    content = read_if_whole(path)
    return content if isinstance(content, dict) else None
