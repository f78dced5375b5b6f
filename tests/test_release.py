"""What a release says of itself in several files."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from scalabl.core import __version__

ROOT = Path(__file__).parents[1]


def test_every_file_names_the_same_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and newest[1] == __version__


def test_the_workflow_runs_what_the_project_calls_its_check() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert [step["run"] for step in workflow["jobs"]["suite"]["steps"] if "run" in step][-1] == ".ci/run"
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
