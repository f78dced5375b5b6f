"""The program called in this process, and one finished run of each method for the commands that read one."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from program import Program, Said, short
from tiny_base import as_json, questions, write_jsonl
from transformers.utils import logging as transformers_logging

from scalabl.cli import main
from scalabl.training.run import train


@pytest.fixture
def program(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """`program("evaluate", DIR, ...)` runs the command line as `scalabl evaluate DIR ...`."""
    chatty = ("torch", "torchao", "torch.utils._pytree", "bitsandbytes", "accelerate", "peft")
    levels = {name: logging.getLogger(name).level for name in chatty}
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


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twenty questions as JSONL."""
    return write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(20)))
