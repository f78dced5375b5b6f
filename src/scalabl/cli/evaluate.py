"""`scalabl evaluate`: how good, how calibrated and how sure a run is on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from scalabl.cli import options
from scalabl.cli.app import app
from scalabl.core import processes
from scalabl.core.console import quiet, words_console
from scalabl.core.errors import UserError
from scalabl.runs.record import HEAD, RunRecord

_OPEN = "Open questions"


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, or an adapter's.")],
    data: Annotated[
        str | None, typer.Option(help="A benchmark's name, a JSONL file or a directory; else the run's held-out rows.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="test if there is one, else every row.")] = None,
    predictive: options.Predictive = None,
    samples: options.Samples = 10,
    seed: options.Seed = 0,
    draws: options.Draws = "independent",
    adaptive: options.Adaptive = False,
    confidence: options.Confidence = 0.95,
    bound: options.Bound = "t",
    stochastic_layers: options.StochasticLayers = None,
    priors: options.Priors = None,
    raw: options.Raw = False,
    ood: Annotated[
        list[str] | None, typer.Option(help="Rows of another kind to tell apart, labelled or not; may repeat.")
    ] = None,
    calibrate: Annotated[str | None, typer.Option(help="Fit a temperature on this data's validation rows.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Mark the threshold that promises this error rate among answers.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Take so many rows.")] = None,
    batch_size: options.BatchSize = 8,
    model: options.BaseModel = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    labels: options.Labels = None,
    scoring: options.Scoring = None,
    template: options.Template = None,
    chat: options.Chat = None,
    max_length: options.MaxLength = None,
    measure: Annotated[str, typer.Option(help="Of right: exact_match, contains, number.", rich_help_panel=_OPEN)] = (
        "exact_match"
    ),
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", rich_help_panel=_OPEN)] = 32,
    answers: Annotated[int, typer.Option(help="Further, sampled ones to a question.", rich_help_panel=_OPEN)] = 0,
    equivalence: Annotated[
        str, typer.Option(help="Which answers mean the same, as in generate.", rich_help_panel=_OPEN)
    ] = "normalised",
) -> None:
    """Accuracy, NLL, ECE, Brier, AUROC and AURC, each with its interval; as learnt, and by the run's calibration.

    On open questions (nq-open, triviaqa, sciq, or JSONL rows with "answers"): how often answers are right, and for each
    score how well it tells which are wrong; the confidence fitted on validation questions is kept for generate.
    """
    from scalabl.data.load import is_open

    if data is not None and is_open(data):
        from scalabl.cli.open_questions import evaluate_open

        options.refuse_unread(
            evaluate, "for questions with choices; leave it out for open questions", predictive=predictive,
            draws=draws, adaptive=adaptive, bound=bound, confidence=confidence,
            stochastic_layers=stochastic_layers, priors=priors, raw=raw, ood=ood, calibrate=calibrate,
            max_error=max_error, report=report, labels=labels, scoring=scoring, template=template,
            max_length=max_length,
        )  # fmt: skip
        return evaluate_open(
            run, data, samples=samples, seed=seed, split=split, limit=limit, batch_size=batch_size, measure=measure,
            max_new_tokens=max_new_tokens, answers=answers, equivalence=equivalence, chat=chat, json=json,
            model=model,
        )  # fmt: skip
    if not adaptive and max_error is None:
        options.refuse_unread(evaluate, "of --adaptive or --max-error; leave it out", confidence=confidence)
    from scalabl.core.files import write_json
    from scalabl.core.outputs import require_writable
    from scalabl.data.load import rows_of, shifted_rows, some_of
    from scalabl.inference.promise import held_out_rows
    from scalabl.runs.stock import OTHER_PROMPT, is_stock, read_classifier

    asked = options.asked_of(
        run, data, labels=labels, scoring=scoring, template=template, chat=chat, max_length=max_length
    )
    record = read_classifier(run, model=model, asked=asked)
    settings = options.prediction_settings(
        record, predictive=predictive, samples=samples, seed=seed, draws=draws, adaptive=adaptive,
        confidence=confidence, stochastic_layers=stochastic_layers, batch_size=batch_size, limit=limit,
        max_error=max_error, priors=priors, raw=raw,
    )  # fmt: skip
    if priors is not None and calibrate is not None:
        raise UserError("--calibrate fits under the training rows' priors, not under --priors; leave out one of them.")
    require_writable(json, report, reads=(run, data, *(ood or ()), calibrate, priors, model))
    known = record.labels
    if data is None:
        options.refuse_unread(evaluate, "of --data; without it the run's held-out rows are taken", split=split)
        rows, data = some_of(held_out_rows(record, "scalabl evaluate needs --data"), limit), _of_the_run(record)
        if not rows:
            raise UserError("The run held out no rows; give labelled ones as --data.")
    else:
        rows = rows_of(data, split=split, limit=limit, labels=known)
    several = record.several
    shifted = {name: shifted_rows(name, limit=limit, labels=known, several=several) for name in ood or []}
    options.refuse_unread(
        evaluate, "for open questions; leave it out for questions with choices", measure=measure,
        max_new_tokens=max_new_tokens, answers=answers, equivalence=equivalence,
    )  # fmt: skip
    held_out = rows_of(calibrate, split="validation", labels=known) if calibrate else []

    from scalabl.inference.evaluation import evaluate_run
    from scalabl.inference.report.render import write
    from scalabl.inference.report.table import print_table, table
    from scalabl.inference.report.verdict import in_short

    quiet()
    made = evaluate_run(
        run, rows, shifted, held_out, settings, data=data, batch_size=batch_size, model=model, asked=asked,
        with_baseline=report is not None,
    )  # fmt: skip
    if not processes.is_main():
        return
    figures = table(made)
    if json is not None:
        write_json(json, _as_json(figures, record, data, seed))
    if report is not None:
        write(made, report)
    print_table(figures, words_console())
    if not figures[made.lead]["collapsed"]:  # of which the table has warned
        words_console().print(in_short(made, figures))
    if figures[0]["collapsed"] and is_stock(record) and record.scoring["scoring"] != HEAD:
        words_console().print(OTHER_PROMPT, style="bold yellow")


def _of_the_run(record: RunRecord) -> str:
    """What the run's held-out rows are called: figures on rows that a calibration was fitted on flatter it a little."""
    fitted = ", which its calibration was fitted on" if record.calibration else ""
    return f"the held-out rows of {record.recipe['data']}{fitted}"


def _as_json(figures: list[dict[str, Any]], record: RunRecord, data: str, seed: int) -> dict[str, Any]:
    """The first row's figures at the top (accuracy, nll, ece, brier, auroc, aurc, n), further rows behind."""
    return {
        **figures[0],
        "data": data,
        "model": record.model,
        "seed": seed,
        "versions": record.versions,
        "further": figures[1:],
    }
