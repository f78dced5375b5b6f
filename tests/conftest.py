"""Fixtures that several rooms' tests share; `tiny_base.py` beside it holds what they are made of.

It is imported inside them, so that tests which need no model do not wait for torch and transformers.
"""

from pathlib import Path

import pytest


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
