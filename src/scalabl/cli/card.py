"""`scalabl card`: a run's model card with a picture of how true its confidence is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalabl.cli import options
from scalabl.cli.app import app
from scalabl.core.console import quiet, say
from scalabl.core.errors import UserError
from scalabl.runs.record import RunRecord


@app.command()
def card(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")],
    data: Annotated[
        str | None, typer.Option(help="Labelled rows it was not trained on; the run's held-out rows if left out.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="test if there is one, else every row.")] = None,
    samples: options.Samples = 10,
    seed: options.Seed = 0,
    limit: Annotated[int | None, typer.Option(help="Take so many rows.")] = None,
    batch_size: options.BatchSize = 8,
    model: options.BaseModel = None,
) -> None:
    """Predict labelled rows, draw the reliability as DIR/reliability.svg, and write DIR/README.md with it.

    A README.md of your own stays; the picture lies beside it.
    """
    from scalabl.core.files import require_place, write_text
    from scalabl.data.load import rows_of, some_of
    from scalabl.inference.promise import held_out_rows
    from scalabl.runs.card import PICTURE, shows_picture, write_cards

    record = RunRecord.read_classifier(run)
    settings = options.prediction_settings(
        record, predictive=None, samples=samples, seed=seed, draws="independent", adaptive=False, confidence=0.95,
        stochastic_layers=None, batch_size=batch_size, limit=limit,
    )  # fmt: skip
    require_place(run)
    if data is None:
        options.refuse_unread(card, "of --data; without it the run's held-out rows are taken", split=split)
        rows, name = some_of(held_out_rows(record, "scalabl card needs --data"), limit), "held-out rows"
        if not rows:
            raise UserError("The run held out no rows; give labelled ones as --data.")
    else:
        rows, name = rows_of(data, split=split, limit=limit, labels=record.labels), f"rows of {Path(data).name}"

    from scalabl.inference.evaluation import evaluate_run
    from scalabl.inference.report.lead import as_file, lead_pictures
    from scalabl.inference.report.table import table

    quiet()
    made = evaluate_run(run, rows, {}, [], settings, data=name, batch_size=batch_size, model=model)
    write_text(run / PICTURE, as_file(lead_pictures(made, table(made))))
    write_cards(run, record, pictured=f"{len(rows):,} {name}")
    say(f"picture  {run / PICTURE}")
    say(f"card     {run / 'README.md'}" + ("" if shows_picture(run) else ", which is your own and stays as it is"))
