"""`scalabl calibrate`: a finished run's calibration, fitted anew on labelled rows of where it is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalabl.cli import options
from scalabl.cli.app import app
from scalabl.core.console import quiet, words_console
from scalabl.core.locations import expanded
from scalabl.runs.record import RunRecord


@app.command()
def calibrate(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")],
    data: Annotated[str, typer.Option(help="Labelled rows it was not trained on: a benchmark, a JSONL file.")],
    split: Annotated[str | None, typer.Option(help="Of a benchmark or a directory; validation if left out.")] = None,
    predictive: options.Predictive = None,
    samples: options.Samples = 10,
    seed: options.Seed = 0,
    limit: Annotated[int | None, typer.Option(help="Take so many rows.")] = None,
    batch_size: options.BatchSize = 8,
    model: options.BaseModel = None,
    json: Annotated[Path | None, typer.Option(help="Write the calibration here too.")] = None,
) -> None:
    """Fit the posterior's scale and the temperature on labelled rows, and keep them in the run's record.

    predict, evaluate and Classifier use them from then on.
    """
    from scalabl.core.files import require_place, write_json
    from scalabl.core.outputs import require_writable
    from scalabl.data.load import rows_of

    record = RunRecord.read_classifier(run)
    settings = options.prediction_settings(
        record, predictive=predictive, samples=samples, seed=seed, draws="independent", adaptive=False,
        confidence=0.95, stochastic_layers=None, batch_size=batch_size, limit=limit, raw=True,
    )  # fmt: skip
    require_writable(json, reads=(run, data, model))
    require_place(run)
    if split is None and not expanded(data).is_file():
        split = "validation"  # never rows that it was trained on or is tested with
    rows = rows_of(data, split=split, limit=limit, labels=record.labels)
    from scalabl.inference.calibrate import calibrate as fit

    quiet()
    before, made = fit(run, rows, settings, batch_size=batch_size, model=model)
    if json is not None:
        write_json(json, made.as_dict())
    console = words_console()
    if left_out := len(rows) - made.rows:
        console.print(f"left out  {left_out:,} of {len(rows):,} rows, which the run was trained on")
    console.print(f"before  {'none' if before is None else before.in_words()}")
    console.print(f"now     {made.in_words()}")
