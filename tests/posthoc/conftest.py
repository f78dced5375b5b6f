"""The program called in this process, from the command line's own tests."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from plain_lora import plain_adapter
from tiny_base import as_json, questions, write_jsonl

from scalabl.cli import main


@pytest.fixture
def program(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`program("bayesianize", DIR, ...)` -> exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["scalabl", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return run


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of stock PEFT, with ranks and scalings by layer; not to be changed."""
    directory = tmp_path_factory.mktemp("stock") / "adapter"
    return plain_adapter(directory, rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 5}, use_rslora=True)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twenty labelled questions as JSONL."""
    return write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(20)))
