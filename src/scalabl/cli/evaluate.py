"""`scalabl evaluate`: how good, how calibrated and how sure a run is on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from scalabl.cli.main import app
from scalabl.errors import UserError
from scalabl.methods import SAMPLED


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")],
    data: Annotated[str, typer.Option(help="A benchmark's name, a JSONL file, or a directory of them.")],
    split: Annotated[str | None, typer.Option(help="test if there is one, else every row.")] = None,
    predictive: Annotated[str | None, typer.Option(help="mean, mc (default with a posterior) or linearized.")] = None,
    samples: Annotated[int, typer.Option(help="Particles of mc.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the particles.")] = 0,
    ood: Annotated[list[str] | None, typer.Option(help="A shifted data set to tell apart; may repeat.")] = None,
    calibrate: Annotated[str | None, typer.Option(help="Fit a temperature on this data's validation rows.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take so many rows.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    model: Annotated[str | None, typer.Option(help="The base model, if it has moved.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
) -> None:
    """Accuracy, NLL, ECE, Brier, AUROC and AURC, each with its interval."""
    from scalabl.rows import rows_of
    from scalabl.run_directory import finished_record, require_writable, write_json

    record = finished_record(run)
    check_predictive(predictive, samples, batch_size, limit, record)
    require_writable(json, report)
    labels = record["task"]["labels"]
    rows = rows_of(data, split=split, limit=limit, labels=labels)
    shifted = {name: rows_of(name, limit=limit, labels=labels) for name in ood or []}
    held_out = rows_of(calibrate, split="validation", labels=labels) if calibrate else []

    from rich.console import Console

    from scalabl.cli.quiet import quiet
    from scalabl.evaluation import evaluate_run
    from scalabl.report import print_table, table, write

    quiet()
    made = evaluate_run(
        run, rows, shifted, held_out, predictive=predictive, samples=samples, seed=seed, batch_size=batch_size,
        model=model, data=data,
    )  # fmt: skip
    figures = table(made)
    print_table(figures, Console())
    if json is not None:
        write_json(json, _as_json(figures, record, data, seed))
    if report is not None:
        write(made, report)


def check_predictive(
    predictive: str | None, samples: int, batch_size: int, limit: int | None, record: dict[str, Any]
) -> None:
    if predictive not in (None, "mean", "mc", "linearized"):
        raise UserError(f"--predictive is {predictive!r}; it must be mean, mc or linearized.")
    if predictive == "linearized" and record["recipe"]["method"] != "scalabl":
        raise UserError("Only ScalaBL runs have a linearised predictive; use --predictive mean or mc.")
    if predictive == "mc" and record["recipe"]["method"] not in SAMPLED:
        raise UserError("This run is a plain LoRA without a posterior; use --predictive mean.")
    for name, value in (("--samples", samples), ("--batch-size", batch_size), ("--limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")


def _as_json(figures: list[dict[str, Any]], record: dict[str, Any], data: str, seed: int) -> dict[str, Any]:
    """The first row's figures at the top (accuracy, nll, ece, brier, auroc, aurc, n), further rows behind."""
    return {
        **figures[0],
        "data": data,
        "model": record["recipe"]["model"],
        "seed": seed,
        "versions": record["versions"],
        "further": figures[1:],
    }
