"""What every benchmark shares: options, the facts of a measurement, figures kept for a second start, statistics over
rounds and over seeds, and results as JSON, Markdown, CSV and SVG, written whole or not at all.

Imports nothing heavy: a parent process must stay small, so that the peak memory of its children is their own.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from scalabl.core import __version__
from scalabl.core.files import write_text
from scalabl.core.workers import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
STYLE: Any = {"svg.fonttype": "none", "font.size": 9, "text.parse_math": False}
PACKAGES = ("torch", "transformers", "peft", "accelerate")


def options(doc: str | None, **named: Any) -> argparse.ArgumentParser:
    """A command line.

    Args:
        doc: the script's text, shown as help.
        named: an option's default, or (default, help), or (default, help, choices). Its type is the default's; of a
            list it takes one value or more; a type instead of a default makes it required.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, given in named.items():
        default, text, choices, *_ = (*given, None, None) if isinstance(given, tuple) else (given, None, None)
        own: dict[str, Any] = {"help": text, "choices": choices}
        if isinstance(default, type):
            own |= {"type": default, "required": True}
        elif isinstance(default, list):
            own |= {"type": type(default[0]), "nargs": "+", "default": default}
        else:
            own |= {"type": type(default) if default is not None else str, "default": default}
        short = [f"-{name}"] if len(name) == 1 else []
        parser.add_argument(*short, f"--{name.replace('_', '-')}", **own)
    return parser


def facts(**own: str) -> dict[str, str]:
    """`own` facts of a measurement (model, data, seeds ...), then versions, device, date, commit and command."""
    shared = {"versions": versions(), "device": own.pop("device", cpu_name())}
    shared |= {"date": date.today().isoformat(), "commit": commit(), "command": command()}
    return own | {key: value for key, value in shared.items() if value}


def versions() -> str:
    """Python's and the packages' versions, in a line."""
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
    return f"CPU, {processor()}, {os.cpu_count()} cores ({platform.machine()})"


def load_average() -> str:
    """How busy the machine is, over the last minute; other work makes ratios noisier."""
    return f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def digest(content: Any) -> str:
    """Twelve hex digits that name plain values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def kept(path: Path, made_from: Callable[[], Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, made once for what it is made from; a second start reads it from the file."""

    def plain() -> Any:
        return json.loads(json.dumps(made_from()))

    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not known or known["made_from"] != plain():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {"made_from": plain(), "made": made}
        write_text(path, json.dumps(known, allow_nan=False) + "\n")
    found: dict[str, Any] = known["made"]
    return found


def write_results(
    directory: Path,
    name: str,
    content: dict[str, Any] | None,
    page: str,
    csv: str = "",
    svg: str = "",
    show: bool = True,
) -> None:
    """NAME.json, NAME.md, NAME.csv and NAME.svg, those that there are; the page is printed too if `show`."""
    directory.mkdir(parents=True, exist_ok=True)
    if content is not None:
        write_text(directory / f"{name}.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_text(directory / f"{name}.md", page.strip() + "\n")
    for suffix, text in (("csv", csv), ("svg", svg)):
        if text:
            write_text(directory / f"{name}.{suffix}", text)
    if show:
        print(page, flush=True)


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """One line a row; None is empty. Columns that are not named are those of the rows, in their order."""
    text = io.StringIO()
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def svg(figure: Any, salt: str, description: str | None = None) -> str:
    """A matplotlib figure as SVG; the same text for the same figures, whose ids `salt` settles."""
    import matplotlib

    out = io.StringIO()
    metadata = {"Date": None} | ({"Description": description} if description else {})
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata=metadata)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(rows: Sequence[Mapping[str, Any]], *columns: tuple[str, str | Callable[[Any], str]]) -> str:
    """A Markdown table of rows; a column is its heading and a format such as "{nll:.3f}", or a function of the row."""
    cells = [[form.format_map(row) if isinstance(form, str) else form(row) for _, form in columns] for row in rows]
    return markdown_table([heading for heading, _ in columns], cells)


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


def ratios(values: Sequence[float], others: Sequence[float], digits: int) -> dict[str, Any]:
    """The ratios of one round each, rounded, with the median of the exact ones and its interval."""
    of_rounds = [value / other for value, other in zip(values, others, strict=True)]
    return median_with_interval(of_rounds) | {"ratios": [round(ratio, digits) for ratio in of_rounds]}


def mean_with_interval(values: Sequence[float | None]) -> dict[str, float | None]:
    """{mean, sd, low, high} over seeds, the 95 % interval Student's; all None where a seed has no value, and the last
    three with a single seed."""
    from scipy import stats

    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return dict.fromkeys(("mean", "sd", "low", "high"))
    mean = statistics.fmean(known)
    if len(known) == 1:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    sd = statistics.stdev(known)
    half = float(stats.t.ppf(0.975, len(known) - 1)) * sd / len(known) ** 0.5
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def excludes_zero(low: float | None, high: float | None) -> bool:
    """Whether there is an interval, and it leaves out zero."""
    return low is not None and high is not None and not low <= 0 <= high


def interleaved(names: Sequence[str], rounds: int, seed: int, measure: Callable[[str], Any]) -> dict[str, list[Any]]:
    """Measure every name once a round, in an order drawn anew for each round; name -> one result a round."""
    generator = random.Random(seed)
    results: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in generator.sample(list(names), len(names)):
            results[name].append(measure(name))
    return results
