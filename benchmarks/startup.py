"""How long `scalabl` takes to say something: its help, its refusals of bad arguments, and `import scalabl`.

    python benchmarks/startup.py

Every run is a process of its own; all are run once a round, in an order drawn anew for each round. Times are given as
"within 0.5 s" and as ratios to an interpreter that does nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

LIMIT = 0.5  # seconds
NOTHING = "python -c pass"
# what is typed -> exit code; the run directory and the files do not exist
PROGRAM = {
    "scalabl --help": 0,
    "scalabl --version": 0,
    "scalabl train --help": 0,
    "scalabl serve": 2,
    "scalabl train": 2,
    "scalabl train --output out --steps many": 2,
    "scalabl train --output out --data missing.jsonl": 2,
    "scalabl train --output out --data arc-easy --method bayes": 2,
    "scalabl train --output out --data arc-easy --steps -1": 2,
    "scalabl train --output out --data arc-easy --prior-std 0": 2,
    "scalabl train --output out --data arc-easy --config missing.yaml": 2,
    "scalabl evaluate missing --data arc-easy": 2,
    "scalabl predict missing --input missing.jsonl --output answers.jsonl": 2,
    "scalabl inspect missing": 2,
    "scalabl plan --model missing --card 24XB": 2,
    "scalabl demo --steps 0": 2,
}
IMPORTS = {
    "import scalabl": "import scalabl",
    "import peft": "import peft",
    "import scalabl, peft": "import scalabl, peft",
}
# runs the program in this interpreter, and says at its end whether torch was imported
WATCHED = """
import atexit, sys
atexit.register(lambda: print("\\ntorch" if "torch" in sys.modules else "\\nno torch", file=sys.stderr))
"""
ENTRY = "import sys; sys.argv[0] = 'scalabl'; from scalabl.cli import main; main()"


def line_of(name: str) -> list[str]:
    """The command line of one entry."""
    if name == NOTHING:
        return [sys.executable, "-c", "pass"]
    if name in IMPORTS:
        return [sys.executable, "-c", IMPORTS[name]]
    installed = Path(sys.executable).with_name("scalabl")
    start = [str(installed)] if installed.exists() else [sys.executable, "-c", ENTRY]
    return [*start, *name.split()[1:]]


def seconds(line: list[str], code: int, directory: Path) -> float:
    """Wall-clock time of a process that must end with `code`."""
    start = time.perf_counter()
    made = subprocess.run(line, cwd=directory, env=_environment(), capture_output=True, text=True)
    elapsed = time.perf_counter() - start
    if made.returncode != code:
        raise SystemExit(f"{' '.join(line)} ended with {made.returncode}, not {code}:\n{made.stdout}{made.stderr}")
    return elapsed


def output_of(name: str, expected: int, directory: Path) -> tuple[bool, str]:
    """Whether torch was imported, and standard error, of a process that must end with the exit code `expected`."""
    code = IMPORTS.get(name, ENTRY)
    line = [sys.executable, "-c", WATCHED + code, *(name.split()[1:] if name in PROGRAM else [])]
    made = subprocess.run(line, cwd=directory, env=_environment(), capture_output=True, text=True)
    *lines, torch = made.stderr.strip().splitlines() or [""]
    if torch not in ("torch", "no torch"):
        raise SystemExit(f"{name} did not run to its end:\n{made.stderr}")
    if made.returncode != expected:
        raise SystemExit(f"{name} ended with {made.returncode}, not {expected}:\n{made.stdout}{made.stderr}")
    return torch == "torch", " ".join(text for text in map(_unframed, lines) if text)


def _unframed(line: str) -> str:
    """A line without the frame that typer draws around an error."""
    return "" if line.startswith(("╭", "╰")) else line.strip("│ ")


def _environment() -> dict[str, str]:
    # wide enough for a refusal to stand in one line; compiled files are kept, as a user's interpreter keeps them
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def measure(rounds: int, seed: int) -> dict[str, dict[str, Any]]:
    """Entry -> its figures."""
    codes = {NOTHING: 0, **PROGRAM, **dict.fromkeys(IMPORTS, 0)}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        # the warm-up too: every entry runs once before it is timed
        outputs = {entry: output_of(entry, code, directory) for entry, code in codes.items() if entry != NOTHING}

        def timed_once(entry: str) -> float:
            return seconds(line_of(entry), codes[entry], directory)

        timed = harness.interleaved(list(codes), rounds, seed, timed_once)
        left = sorted(path.name for path in directory.iterdir())
    if left:
        raise SystemExit(f"the refused commands left files behind: {', '.join(left)}")
    results: dict[str, dict[str, Any]] = {}
    for entry, own in timed.items():
        torch, text = outputs.get(entry, (False, ""))
        results[entry] = {
            "exit_code": codes[entry],
            "torch_imported": torch,
            "said": text if entry in PROGRAM else "",  # what libraries say at their import is not ours
            "within_limit": harness.median_with_interval(own)["median"] <= LIMIT,
            "slowest_within_limit": max(own) <= LIMIT,
            "to_nothing": harness.ratios(own, timed[NOTHING], 4),
            "to_import_peft": harness.ratios(own, timed["import peft"], 4),
        }
    return results


def main() -> None:
    """Measure, and write startup.json and .md."""
    parser = harness.options(__doc__, rounds=9, seed=(0, "of the order"), output=harness.RESULTS)
    a = parser.parse_args()
    load = harness.load_average()
    results = measure(a.rounds, a.seed)
    known = harness.facts(
        model="none is loaded",
        data="none, or the packaged ARC-Easy where it is named",
        seeds=f"{a.seed} (of the order)",
        rounds=f"{a.rounds}, every entry once a round as a process of its own, after one warm-up",
        load=f"{load} before, {harness.load_average()} after",
    )
    content = {"facts": known, "limit_seconds": LIMIT, "entries": results}
    harness.write_results(a.output, "startup", content, markdown(content))


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    rows = [result | {"entry": entry, "program": entry in PROGRAM} for entry, result in content["entries"].items()]

    def within(row: dict[str, Any]) -> str:
        yes = "yes" if row["slowest_within_limit"] else "yes (not every run)"
        return "" if not row["program"] else yes if row["within_limit"] else "no"

    shown = harness.table(
        rows,
        ("command", "`{entry}`"),
        ("exit code", "{exit_code}"),
        ("imports torch", lambda row: "yes" if row["torch_imported"] else "no"),
        ("within 0.5 s", within),
        (f"/ `{NOTHING}`", "{to_nothing[median]:.1f} ({to_nothing[low]:.1f} to {to_nothing[high]:.1f})"),
        ("/ `import peft`", lambda row: "" if row["program"] else _PEFT.format_map(row)),
    )
    refusals = "\n".join(f"- `{row['entry']}`: {row['said']}" for row in rows if row["exit_code"])
    return f"""# Start of the program

{shown}

Within 0.5 s: the median over rounds. Ratios: medians of the ratios within a round, with their 95 % bootstrap interval.

What the refused commands say:

{refusals}

{harness.markdown_facts(content["facts"])}
"""


_PEFT = "{to_import_peft[median]:.3f} ({to_import_peft[low]:.3f} to {to_import_peft[high]:.3f})"


if __name__ == "__main__":
    main()
