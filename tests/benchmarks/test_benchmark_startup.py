"""What the program answers at once: its help and its refusals never import torch."""

from pathlib import Path

import pytest
from startup import IMPORTS, NOTHING, PROGRAM, line_of, output_of, seconds


@pytest.mark.parametrize("name", PROGRAM)
def test_answers_without_torch(name: str, tmp_path: Path) -> None:
    torch, said = output_of(name, PROGRAM[name], tmp_path)
    assert not torch
    assert bool(said) == (PROGRAM[name] != 0)
    assert not list(tmp_path.iterdir())


def test_importing_the_package_does_not_import_torch(tmp_path: Path) -> None:
    assert output_of("import scalabl", 0, tmp_path) == (False, "")


def test_torch_is_seen_where_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPORTS, "import torch", "import torch")
    assert output_of("import torch", 0, tmp_path) == (True, "")


def test_only_runs_that_end_as_they_must_are_timed(tmp_path: Path) -> None:
    assert seconds(line_of(NOTHING), 0, tmp_path) > 0
    with pytest.raises(SystemExit, match="ended with 0, not 2"):
        seconds(line_of(NOTHING), 2, tmp_path)
