"""What a piece of work costs: wall time, peak memory, and the machine that it was measured on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from scalabl import __version__

_MIB = 2**20


@dataclass
class Cost:
    """Wall time in seconds, and the peak memory in MiB: the accelerator's, or the process's on a CPU."""

    seconds: float = 0.0
    peak_memory: float = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    """Context whose cost is known at its end."""
    cost = Cost()
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
