"""The program called in this process, and one finished run of each method for the commands that read one."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_base import tiny_base
from transformers.utils import logging as transformers_logging

from scalabl.cli import main
from scalabl.training.recipe import Recipe
from scalabl.training.run import train


@dataclass(frozen=True)
class Said:
    """What the program said."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """Its one sentence on standard error, after exit code 2 and silence on standard output."""
        assert self.code == 2, self
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("scalabl: "), self.err
        return lines[0].removeprefix("scalabl: ")


Program = Callable[..., Said]


@pytest.fixture
def program(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """`program("evaluate", DIR, ...)` runs the command line as `scalabl evaluate DIR ...`."""
    levels = {
        name: logging.getLogger(name).level for name in ("torch", "torchao", "bitsandbytes", "accelerate", "peft")
    }
    verbosity, environment = transformers_logging.get_verbosity(), dict(os.environ)

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["scalabl", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return Said(end.value.code, out, err)

    yield run
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    transformers_logging.set_verbosity(verbosity)
    os.environ.clear()
    os.environ.update(environment)


def short(task: Path, **changes: object) -> Recipe:
    """Four steps of training."""
    settings: dict[str, object] = {
        "model": str(tiny_base()), "data": str(task), "steps": 4, "batch_size": 4, "r": 4, "layers": "last:2",
        "scoring": "continuation", "normalization": "token", "validation_rows": 4,
    }  # fmt: skip
    return Recipe(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def scalabl_run(tmp_path_factory: pytest.TempPathFactory, task_directory: Path) -> Path:
    """A finished run with a posterior; not to be changed."""
    output = tmp_path_factory.mktemp("runs") / "scalabl"
    train(short(task_directory, learning_rate=0.05), output)
    return output


@pytest.fixture(scope="session")
def mle_run(tmp_path_factory: pytest.TempPathFactory, task_directory: Path) -> Path:
    """A finished run of plain LoRA; not to be changed."""
    output = tmp_path_factory.mktemp("runs") / "mle"
    train(short(task_directory, method="mle", learning_rate=0.05), output)
    return output
