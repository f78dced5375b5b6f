"""A cell: a piece of work that is done once, in a directory named after everything that decides its outcome.

OUTPUT/cells/ADDRESS/settings.json    what the address is the SHA-256 of
OUTPUT/cells/ADDRESS/run/             training: a run directory
OUTPUT/cells/ADDRESS/posthoc/         post-hoc: what the method fitted
OUTPUT/cells/ADDRESS/predictions.safetensors    prediction: log class probabilities and labels
OUTPUT/cells/ADDRESS/finished.json    written last: time, memory, machine
OUTPUT/cells/ADDRESS/failed.json      why it could not be done, if it could not
OUTPUT/cells/ADDRESS/log.txt          what was said meanwhile

What a piece of work costs: wall time, peak memory, and the machine that it was measured on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from scalabl.core import __version__
from scalabl.data.example import Example

TRAINING, POST_HOC, PREDICTION = "training", "posthoc", "prediction"
FORMAT = 1  # part of every address: raised when a cell's content changes its meaning
_DIGITS = 16


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


def rows_digest(rows: Sequence[Example]) -> str:
    """SHA-256 of rows, in their order, without their ids."""
    return digest([[row.question, row.choices, row.answer, *row.content[2:]] for row in rows])


def finished(output: Path, address: str) -> dict[str, Any] | None:
    """What a finished cell measured; None for a cell that is not finished."""
    return _read(output / "cells" / address / "finished.json")


def failure(output: Path, address: str) -> dict[str, Any] | None:
    """Why a cell failed when it was last tried, or None: {"error", "invocation"}."""
    return _read(output / "cells" / address / "failed.json")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


_MIB = 2**20


@dataclass
class MeasuredCost:
    """Wall time in seconds, and the peak memory in MiB: the accelerator's, or the process's on a CPU."""

    seconds: float = 0.0
    peak_memory: float = 0.0


@contextmanager
def measured() -> Iterator[MeasuredCost]:
    """Context whose cost is known at its end."""
    cost = MeasuredCost()
    _forget_peak()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        cost.seconds = time.perf_counter() - start
        cost.peak_memory = _peak() / _MIB


def machine() -> dict[str, str]:
    """device: "cpu x86_64, 2 cores, 1 thread" or the accelerator's name; versions: of what computes."""
    if torch.cuda.is_available():
        device = f"cuda, {torch.cuda.get_device_name()}"
    else:
        threads = torch.get_num_threads()
        cores = f"{os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''} a process"
        device = f"cpu {platform.machine()}, {cores}"
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    versions = ", ".join(f"{name} {number}" for name, number in {"scalabl": __version__, **packages}.items())
    return {"device": device, "versions": versions}


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew


def _peak() -> int:
    """Bytes. Where the system cannot start it anew, the peak of the whole process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if platform.system() == "Darwin" else 1024 * used
