"""How much memory there is: a card's by its name, this machine's by asking. Imports torch only to ask."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from scalabl.core.errors import UserError

_UNITS = {"": 1, "B": 1, **{f"{u}B": 1000**i for i, u in enumerate("KMGT", 1)}}
_UNITS |= {f"{u}IB": 1024**i for i, u in enumerate("KMGT", 1)}
_CGROUP = Path("/sys/fs/cgroup")


def parse_bytes(text: str) -> int:
    """Bytes of a size as one writes it: 24GB (10^9 bytes each), 24GiB (2^30), or a number of bytes.

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(found[2].upper()) if found else None
    size = round(float(found[1]) * factor) if found and factor else 0
    if size < 1:
        raise UserError(f"The card is {text!r}; give its memory as a size, for example 24GB.")
    return size


def in_words(size: int) -> str:
    """A size as one reads it: 24.0 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 1000)):
        if abs(size) >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


def machine_device() -> str:
    """Where this machine trains: "cuda" or "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def machine_memory(device: str) -> int:
    """Bytes of the CUDA device, or those of the system that are available to this process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return min(int(psutil.virtual_memory().available), _left_in_container())


def _left_in_container() -> int:
    """What a container's limit leaves, which the system's own figures do not know (cgroup version 2, then 1); all of
    the memory where there is no limit."""
    for place, limit, used in (
        (_CGROUP, "memory.max", "memory.current"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            left = int((place / limit).read_text()) - int((place / used).read_text())
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
        # files that were read stay in memory as long as nobody else needs it
        return max(0, left + int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))
    return int(psutil.virtual_memory().total)
