"""Fixtures that several rooms' tests share; `tiny_base.py` beside it holds what they are made of.

It is imported inside them, so that tests which need no model do not wait for torch and transformers.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from program import Output, Program


def pytest_collection_finish() -> None:
    """Imported modules stay: `gc.collect`, of which every cell of a study makes one, need not look through them."""
    gc.collect()
    gc.freeze()


os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's own, 15, its workers stand still beside other tests


@pytest.fixture(scope="session")
def base_directory() -> Path:
    """A tiny random Llama with its tokenizer."""
    from tiny_base import tiny_base

    return tiny_base()


@pytest.fixture(scope="session")
def task_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with 3 to 5 choices: train.jsonl, validation.jsonl, test.jsonl."""
    from tiny_base import write_task

    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SCALABL_CACHE", str(directory))
    return directory


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twenty labelled questions as JSONL."""
    from tiny_base import as_json, questions, write_jsonl

    return write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(20)))


@pytest.fixture
def program(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """`program("evaluate", DIR, ...)` runs the command line as `scalabl evaluate DIR ...`, in this process."""
    from program import Output
    from transformers.utils import logging as transformers_logging

    from scalabl.cli import main

    chatty = ("torch", "torchao", "torch.utils._pytree", "bitsandbytes", "accelerate", "peft")
    levels = {name: logging.getLogger(name).level for name in chatty}
    verbosity, environment = transformers_logging.get_verbosity(), dict(os.environ)

    def run(*arguments: object) -> Output:
        monkeypatch.setattr(sys, "argv", ["scalabl", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return Output(end.value.code, out, err)

    yield run
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    transformers_logging.set_verbosity(verbosity)
    os.environ.clear()
    os.environ.update(environment)
