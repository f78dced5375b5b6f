"""`scalabl evaluate`: how good, how calibrated and how sure a run is on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from scalabl.cli import options
from scalabl.cli.main import app
from scalabl.errors import UserError
from scalabl.methods import SAMPLED
from scalabl.sampling import Sampling
from scalabl.top_layers import check_spec


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")],
    data: Annotated[str, typer.Option(help="A benchmark's name, a JSONL file, or a directory of them.")],
    split: Annotated[str | None, typer.Option(help="test if there is one, else every row.")] = None,
    predictive: options.Predictive = None,
    samples: options.Samples = 10,
    seed: options.Seed = 0,
    draws: options.Draws = "independent",
    adaptive: options.Adaptive = False,
    confidence: options.Confidence = 0.95,
    bound: options.Bound = "t",
    stochastic_layers: options.StochasticLayers = None,
    ood: Annotated[list[str] | None, typer.Option(help="A shifted data set to tell apart; may repeat.")] = None,
    calibrate: Annotated[str | None, typer.Option(help="Fit a temperature on this data's validation rows.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Mark the threshold that promises this error rate among answers.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Take so many rows.")] = None,
    batch_size: options.BatchSize = 8,
    model: options.BaseModel = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
) -> None:
    """Accuracy, NLL, ECE, Brier, AUROC and AURC, each with its interval."""
    from scalabl.rows import rows_of
    from scalabl.run_directory import finished_record, require_writable, write_json

    record = finished_record(run)
    check_predictive(predictive, samples, batch_size, limit, record)
    sampling = check_sampling(draws, adaptive, confidence, bound, predictive, samples, record)
    check_layers(stochastic_layers, predictive, record)
    promise = None
    if max_error is not None:
        from scalabl.promise import Promise

        promise = Promise(max_error, confidence)
        promise.require(record, predictive)
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
        run, rows, shifted, held_out, predictive=predictive, samples=samples, seed=seed, sampling=sampling,
        stochastic_layers=stochastic_layers, batch_size=batch_size, promise=promise, model=model, data=data,
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
    if predictive not in (None, "mean", "mc", "linearized", "auto"):
        raise UserError(f"--predictive is {predictive!r}; it must be mean, mc or linearized, or auto, the default.")
    if predictive == "linearized" and record["recipe"]["method"] != "scalabl":
        raise UserError("Only ScalaBL runs have a linearised predictive; use --predictive mean or mc.")
    if predictive == "mc" and record["recipe"]["method"] not in SAMPLED:
        raise UserError("This run is a plain LoRA without a posterior; use --predictive mean.")
    for name, value in (("--samples", samples), ("--batch-size", batch_size), ("--limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")


def check_sampling(
    draws: str,
    adaptive: bool,
    confidence: float,
    bound: str,
    predictive: str | None,
    samples: int,
    record: dict[str, Any],
) -> Sampling:
    """The draws and adaptive N that the options ask for.

    Raises:
        UserError: bad values, or a run or a predictive that has no such particles.
    """
    sampling = Sampling(draws=draws, confidence=confidence if adaptive else None, bound=bound)
    sampled = predictive == "mc" or (predictive in (None, "auto") and record["recipe"]["method"] in SAMPLED)
    if adaptive and not sampled:
        raise UserError("--adaptive is for the mc predictive of runs that draw particles; leave it out here.")
    if draws != "independent" and not (sampled and record["recipe"]["method"] == "scalabl"):
        raise UserError(f"--draws {draws} is for the mc predictive of ScalaBL runs; leave it out here.")
    if draws == "moments" and samples < 2:
        raise UserError("--draws moments needs at least 2 --samples: one particle has no variance to match.")
    return sampling


def check_layers(stochastic_layers: str | None, predictive: str | None, record: dict[str, Any]) -> None:
    """Refuse --stochastic-layers that name nothing, or where no s is drawn."""
    if stochastic_layers is None:
        return
    check_spec(stochastic_layers, variance=True)
    if predictive == "mean" or record["recipe"]["method"] != "scalabl":
        raise UserError(
            "--stochastic-layers is for the mc and linearized predictives of ScalaBL runs; leave it out here."
        )


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
