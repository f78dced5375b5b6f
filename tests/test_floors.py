"""The house: its floors are a contract, and what a stranger finds by name is there once."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest
from house import PACKAGE, ROOT, deepest_chain, files_in_circles, imports_in_functions
from importlinter.cli import lint_imports

MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}
SLOW = {"torch", "transformers", "peft"}
# where a file that needs torch anyway may import inside a function, and why
INSIDE = {
    "scalabl.training.trainer": "DeepSpeed is there only where it trains",
    "scalabl.runs.models": "torchao is an extra",
}


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


def test_a_public_class_has_a_name_of_its_own() -> None:
    names = Counter(
        node.name
        for file in MODULES.values()
        for node in parsed(file).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, number in names.items() if number > 1] == []


def test_imports_inside_functions_keep_torch_out_of_a_file() -> None:
    """What loads torch already has nothing to gain by importing late."""
    found = {name for name, file in MODULES.items() if imports_in_functions(file) and loads_torch(name)}
    assert found - INSIDE.keys() == set()


def test_a_runs_record_is_read_by_its_fields() -> None:
    """One file knows its keys; elsewhere it is a `RunRecord`."""
    bare = re.compile(r"\brecord(\[|\.get\()")
    found = {name for name, file in MODULES.items() if bare.search(file.read_text(encoding="utf-8"))}
    assert found - {"scalabl.runs.record"} == set()


@functools.cache
def loads_torch(module: str) -> bool:
    """Whether importing a module imports torch, transformers or PEFT."""
    if module not in MODULES:
        return module.split(".")[0] in SLOW
    names = {name for node in at_import(parsed(MODULES[module]).body) for name in imported(node)}
    return any(map(loads_torch, names))


def at_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that are done when a file is, those for type checkers left out."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.Try) or (isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING"):
            yield from at_import(node.body)


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    below = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in MODULES else str(node.module) for name in below]


def parsed(file: Path) -> ast.Module:
    """The file as a tree."""
    return ast.parse(file.read_text(encoding="utf-8"))
