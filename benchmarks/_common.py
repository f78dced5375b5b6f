"""What every benchmark shares: the facts of a measurement, and results written whole or not at all.

Imports nothing heavy: a parent process must stay small, so that the peak memory of its children is their own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate")


def facts(**own: str) -> dict[str, str]:
    """`own` facts of a measurement (model, data, seeds ...), then versions, device, date, commit and command."""
    shared = {"versions": versions(), "device": own.pop("device", cpu_name())}
    shared |= {"date": date.today().isoformat(), "commit": commit(), "command": command()}
    return own | {key: value for key, value in shared.items() if value}


def versions() -> str:
    """Python's and the packages' versions, in a line."""
    from scalabl.core import __version__

    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([f"scalabl {__version__}", f"Python {platform.python_version()}", *found])


def command() -> str:
    """The command that is running, as one types it in the repository."""
    script = Path(sys.argv[0]).resolve()
    shown = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", shown, *sys.argv[1:]])


def commit() -> str:
    """The commit of the code that was measured, with "+ changes" where src/ or benchmarks/ differ; empty if unknown."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + (" + changes" if changed else "")


def _git(*arguments: str) -> str:
    # without optional locks: reading the state must not get in the way of a commit being made
    made = subprocess.run(
        ["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return made.stdout.strip()


def cpu_name() -> str:
    """The processor and how many cores there are."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"CPU, {name}, {os.cpu_count()} cores ({platform.machine()})"


def load_average() -> str:
    """How busy the machine is, over the last minute; other work makes ratios noisier."""
    return f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def write_results(directory: Path, name: str, content: dict[str, Any], markdown: str) -> None:
    """Write NAME.json and NAME.md, each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / f"{name}.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_text(directory / f"{name}.md", markdown.strip() + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_facts(known: dict[str, str]) -> str:
    """The facts as a list."""
    return "\n".join(f"- {name}: {f'`{text}`' if name == 'command' else text}" for name, text in known.items())


def median_with_interval(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> dict[str, float | int]:
    """The median, its 95 % percentile bootstrap interval (Efron 1979) and the quartiles of the values."""
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(resamples))
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "low": _at(medians, 0.025),
        "high": _at(medians, 0.975),
        "quartile_1": quartiles[0],
        "quartile_3": quartiles[2],
        "n": len(values),
    }


def _at(ordered: Sequence[float], fraction: float) -> float:
    return ordered[round(fraction * (len(ordered) - 1))]


def interleaved(names: Sequence[str], rounds: int, seed: int, measure: Callable[[str], Any]) -> dict[str, list[Any]]:
    """Measure every name once a round, in an order drawn anew for each round; name -> one result a round."""
    generator = random.Random(seed)
    results: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in generator.sample(list(names), len(names)):
            results[name].append(measure(name))
    return results
