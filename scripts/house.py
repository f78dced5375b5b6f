"""The house in numbers, as a Markdown table: `python scripts/house.py`, for `docs/architecture.md`."""

from __future__ import annotations

import ast
import functools
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "scalabl"


def layers() -> list[list[str]]:
    """The floors from the top, each a list of rooms, as the contract in pyproject.toml names them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = (found for found in settings["contracts"] if found["type"] == "layers")
    return [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]


def size(*places: Path) -> tuple[int, int]:
    """How many Python files lie there, and their lines."""
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*.py"))]
    return len(files), sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def kinds_of_lines() -> dict[str, int]:
    """The package's lines: blank ones, those of docstrings and comments, and code."""
    found = {"code": 0, "docstrings and comments": 0, "blank": 0}
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        strings = [
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ]
        words = {number for node in strings for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
        for number, line in enumerate(text.splitlines(), start=1):
            of_words = number in words or line.lstrip().startswith("#")
            found["blank" if not line.strip() else "docstrings and comments" if of_words else "code"] += 1
    return found


def imports_in_functions(file: Path) -> list[ast.Import | ast.ImportFrom]:
    """The import statements inside the functions of a file."""
    functions = [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    found = {id(node): node for function in functions for node in ast.walk(function)}.values()
    return [node for node in found if isinstance(node, ast.Import | ast.ImportFrom)]


def deepest_chain(graph: grimp.ImportGraph) -> list[str]:
    """The longest chain of files of which each imports the next; there must be no circle."""

    @functools.cache
    def below(module: str) -> tuple[str, ...]:
        return (module, *max((below(m) for m in graph.find_modules_directly_imported_by(module)), key=len, default=()))

    return list(max((below(module) for module in sorted(graph.modules)), key=len))


def files_in_circles(graph: grimp.ImportGraph) -> set[str]:
    """The files that import themselves by way of others."""
    return {
        module
        for module in graph.modules
        if any(module in graph.find_upstream_modules(m) for m in graph.find_modules_directly_imported_by(module))
    }


def main() -> None:
    """Print both tables: the whole house, and room by room."""
    graph, floors = grimp.build_graph("scalabl", cache_dir=None), layers()
    files, lines = size(PACKAGE)
    of_benchmarks, lines_of_benchmarks = size(ROOT / "benchmarks")
    circles = files_in_circles(graph)
    inside = {file: len(imports_in_functions(file)) for file in PACKAGE.rglob("*.py")}
    of_cli = sum(number for file, number in inside.items() if PACKAGE / "cli" in file.parents)
    print("| measured | number |\n|---|---:|")
    print(f"| rooms | {sum(map(len, floors))} |\n| floors | {len(floors)} |")
    print(f"| files in `src/scalabl` | {files} |\n| lines | {lines:,} |")
    for kind, number in kinds_of_lines().items():
        print(f"| of them {kind} | {number:,} |")
    print(f"| files in a circle of imports | {len(circles)} |")
    print(f"| longest chain of files that import each other | {'-' if circles else len(deepest_chain(graph))} |")
    print(f"| imports inside functions | {sum(inside.values())}, of them {of_cli} in `cli/` |")
    print(f"| files in `benchmarks/` | {of_benchmarks} |\n| lines | {lines_of_benchmarks:,} |")
    print("\n| floor | room | files | lines |\n|---:|---|---:|---:|")
    for floor, rooms in enumerate(reversed(floors), start=1):
        for room in rooms:
            print("| {} | `{}/` | {} | {:,} |".format(floor, room, *size(PACKAGE / room)))


if __name__ == "__main__":
    main()
