"""The progress bar of everything that takes more than a few seconds."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scalabl.core.processes import is_main


def progress_bar() -> Progress:
    """A bar on standard error: what, how many of how many, time gone, time left."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        transient=True,
        # a log file would be left an empty line; of several processes one shows it
        disable=not console.is_terminal or not is_main(),
    )
