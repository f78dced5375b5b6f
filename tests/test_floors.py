"""The house: its floors are a contract, and what a stranger finds by name is there once."""

from __future__ import annotations

import contextlib
import io

import grimp
import pytest
from house import PACKAGE, ROOT, deepest_chain, files_in_circles
from importlinter.cli import lint_imports


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("scalabl", cache_dir=None)


def test_rooms_import_from_floors_below_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        broken = lint_imports(no_cache=True)
    assert not broken, said.getvalue()


def test_no_file_imports_itself_by_way_of_others(graph: grimp.ImportGraph) -> None:
    """The contract compares siblings; a room's `__init__` and a file of the room are none."""
    assert not files_in_circles(graph)
    assert deepest_chain(graph)[0].startswith(("scalabl.cli", "scalabl.__main__"))


def test_no_module_lies_loose_at_the_root() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
