"""`scalabl data`: which benchmarks there are, and fetching them."""

from __future__ import annotations

from typing import Annotated

import typer

from scalabl.cli.app import data


@data.command("list")
def list_benchmarks() -> None:
    """The benchmarks that are known by name."""
    from scalabl.data.registry import BENCHMARKS, OPEN_BENCHMARKS

    for name in (*BENCHMARKS, *OPEN_BENCHMARKS):
        print(name)


@data.command("get")
def get_benchmarks(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Benchmarks; see scalabl data list.")],
) -> None:
    """Fetch benchmarks once, so that they load at once and without a network."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from scalabl.data.load import get

    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True
    ) as progress:
        bar = progress.add_task("", total=None)
        tasks = get(
            names,
            progress=lambda what, done, total: progress.update(
                bar, description=what, completed=done, total=total or None
            ),
        )
    for task in tasks:
        splits = ", ".join(f"{len(rows):,} {name}" for name, rows in task.splits.items())
        print(f"{task.name}: {splits} ({task.source}; {task.licence})")
