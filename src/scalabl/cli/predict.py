"""`scalabl predict`: rows in, answers with their uncertainty out, one JSON line each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalabl.cli.main import app
from scalabl.errors import UserError


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")],
    input: Annotated[Path, typer.Option("--input", help="JSONL rows; answers in them are ignored.")],
    output: Annotated[Path, typer.Option("--output", help="JSONL answers, in the order of the rows.")],
    predictive: Annotated[str | None, typer.Option(help="mean, mc (default with a posterior) or linearized.")] = None,
    samples: Annotated[int, typer.Option(help="Particles of mc.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the particles.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    abstain: Annotated[float | None, typer.Option(help="Answer null below this confidence.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model, if it has moved.")] = None,
) -> None:
    """Answer rows: label, probs, confidence, entropy, aleatoric and epistemic (nats) for each."""
    from scalabl.cli.evaluate import check_predictive
    from scalabl.rows import with_labels
    from scalabl.run_directory import finished_record, require_writable
    from scalabl.tasks import load_rows

    record = finished_record(run)
    check_predictive(predictive, samples, batch_size, None, record)
    if abstain is not None and not 0 <= abstain <= 1:
        raise UserError(f"--abstain is {abstain}; it must be between 0 and 1.")
    require_writable(output)
    labels = record["task"]["labels"]
    rows = with_labels(load_rows(input, labels=labels, require_answer=False), labels, input)

    from scalabl.batch_prediction import predict_file
    from scalabl.cli.quiet import quiet

    quiet()
    predict_file(
        run, rows, output, predictive=predictive, samples=samples, seed=seed, batch_size=batch_size,
        abstain=abstain, model=model,
    )  # fmt: skip
