"""`scalabl demo`: plain LoRA and ScalaBL at the same budget, on a real model and a real benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalabl.cli.app import app
from scalabl.core.files import require_writable, write_json
from scalabl.study.demo import SAMPLES, STEPS, TEST_ROWS, check_demo


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the two runs go.")] = Path("runs/demo"),
    report: Annotated[Path, typer.Option(help="The HTML report.")] = Path("report.html"),
    seed: Annotated[int, typer.Option(help="Of both runs.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimiser steps of each.")] = STEPS,
    test_rows: Annotated[int, typer.Option(help="ARC-Easy test rows.")] = TEST_ROWS,
    samples: Annotated[int, typer.Option(help="Particles.")] = SAMPLES,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Train both, compare them with temperature scaling, and write report.html (about ten minutes on 2 cores)."""
    check_demo(output, steps=steps, test_rows=test_rows, samples=samples)
    require_writable(report, json)

    from rich.console import Console

    from scalabl.core.quiet import quiet
    from scalabl.inference.report.render import write
    from scalabl.inference.report.table import table
    from scalabl.inference.report.terminal import print_table
    from scalabl.study.demo import run_demo

    quiet()
    made = run_demo(output, seed=seed, steps=steps, test_rows=test_rows, samples=samples)
    figures = table(made)
    console = Console()
    for name, text in made.facts.items():
        console.print(f"[dim]{name}:[/dim] {text}", highlight=False)
    print_table(figures, console)
    write(made, report)
    console.print(f"report: {report.resolve()}", highlight=False)
    if json is not None:
        write_json(json, {"facts": made.facts, "methods": figures})
