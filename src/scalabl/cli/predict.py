"""`scalabl predict`: rows in, answers with their uncertainty out, one JSON line each; shards of them with --ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scalabl.cli import options
from scalabl.cli.app import app
from scalabl.core import processes
from scalabl.core.console import say
from scalabl.core.errors import UserError

if TYPE_CHECKING:
    from scalabl.inference.settings import PredictionSettings
    from scalabl.runs.record import RunRecord

_RAY = "Many rows on a cluster"


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, or an adapter's.")],
    input: Annotated[str, typer.Option("--input", metavar="PATH", help="JSONL or Parquet rows; answers are ignored.")],
    output: Annotated[str, typer.Option("--output", metavar="PATH", help="JSONL answers, in the order of the rows.")],
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
    batch_size: options.BatchSize = 8,
    abstain: Annotated[
        float | None, typer.Option(help="Answer null below this confidence.", rich_help_panel=options.ABSTENTION)
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Promise this error rate among answers; null where it could not be kept.",
            rich_help_panel=options.ABSTENTION,
        ),
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            help="Of --max-error: what makes a row sure, probability, entropy or epistemic.",
            rich_help_panel=options.ABSTENTION,
        ),
    ] = "probability",
    guarantee: Annotated[
        str,
        typer.Option(
            help="Of --max-error: exact, or conformal (of all rows, on average).", rich_help_panel=options.ABSTENTION
        ),
    ] = "exact",
    max_false_alarms: Annotated[
        float | None,
        typer.Option(
            help="Answer null out of scope, at this share of false alarms among rows in scope.",
            rich_help_panel=options.ABSTENTION,
        ),
    ] = None,
    oos_score: Annotated[
        str | None,
        typer.Option(
            help="Of --max-false-alarms: distance (where the run has one), entropy, probability, energy or epistemic.",
            rich_help_panel=options.ABSTENTION,
        ),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(
            help="Give the set of labels that holds the right one at this rate.", rich_help_panel=options.ABSTENTION
        ),
    ] = None,
    set_score: Annotated[
        str,
        typer.Option(help="Of --coverage: lac (the smallest sets), aps or raps.", rich_help_panel=options.ABSTENTION),
    ] = "lac",
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class", help="Of --coverage: at that rate in each class.", rich_help_panel=options.ABSTENTION
        ),
    ] = False,
    model: options.BaseModel = None,
    labels: options.Labels = None,
    scoring: options.Scoring = None,
    template: options.Template = None,
    chat: options.Chat = None,
    max_length: options.MaxLength = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Use a Ray cluster that shares the files: its address, auto, or local.",
            rich_help_panel=_RAY,
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Of --ray: jsonl or parquet; as the rows are.", rich_help_panel=_RAY)
    ] = None,
    block_rows: Annotated[
        int, typer.Option(help="Of --ray: rows that a worker answers at a time.", rich_help_panel=_RAY)
    ] = 512,
) -> None:
    """Answer rows: label (labels, where a row may have several), probs, confidence, entropy, aleatoric and epistemic
    (nats) for each.

    Probabilities are those of the run's calibration, where it has one.

    --predictive auto says which predictive it took and why, and names it in every answer.

    With --max-error the label is null where the run is not sure enough to keep that error rate; with
    --max-false-alarms where a row is unlike those that the run was trained on; "reason" says which. With --coverage
    there is a "set" of labels too, null where it has them all. Thresholds come from the run's own held-out rows, which
    are predicted first.

    With --ray, --input is a file, a directory of shards or a pattern such as 'rows/*.parquet', and --output a directory
    with a file of answers for each of them; either may be an address of a store, such as s3://bucket/rows. The same
    command goes on after a kill, with what is missing.
    """
    from scalabl.core.locations import is_address
    from scalabl.core.outputs import require_writable
    from scalabl.data.jsonl import load_rows
    from scalabl.data.load import with_labels
    from scalabl.runs.stock import read_classifier

    if max_error is None:
        options.refuse_unread(predict, "of --max-error; leave it out", score=score, guarantee=guarantee)
        if not adaptive:
            options.refuse_unread(predict, "of --adaptive or --max-error; leave it out", confidence=confidence)
    if max_false_alarms is None:
        options.refuse_unread(predict, "of --max-false-alarms; leave it out", oos_score=oos_score)
    if coverage is None:
        options.refuse_unread(predict, "of --coverage; leave it out", set_score=set_score, per_class=per_class)
    if ray is None:
        options.refuse_unread(predict, "of --ray; leave it out", block_rows=block_rows)
    else:
        options.refuse_unread(
            predict, "of an adapter without a record, which workers cannot read; leave out --ray", labels=labels,
            scoring=scoring, template=template, chat=chat, max_length=max_length,
        )  # fmt: skip
    on_rows = None if ray is not None or is_address(input) else input
    asked = options.asked_of(
        run, on_rows, labels=labels, scoring=scoring, template=template, chat=chat, max_length=max_length
    )
    record = read_classifier(run, model=model, asked=None if ray is not None else asked)
    settings = options.prediction_settings(
        record, predictive=predictive, samples=samples, seed=seed, draws=draws, adaptive=adaptive,
        confidence=confidence, stochastic_layers=stochastic_layers, batch_size=batch_size, abstain=abstain,
        max_error=max_error, score=score, guarantee=guarantee, priors=priors, raw=raw,
        max_false_alarms=max_false_alarms, oos_score=oos_score, coverage=coverage, set_score=set_score,
        per_class=per_class,
    )  # fmt: skip
    if ray is not None:
        if processes.world_size() > 1:
            raise UserError("--ray shares the work by itself; start it without accelerate launch.")
        _predict_shards(record, run, input, output, ray, settings, format, batch_size, block_rows, model)
        return
    if format is not None:
        raise UserError("--format is for --ray; without it the answers are JSONL.")
    given, written = _on_this_machine(input), _on_this_machine(output)
    require_writable(written, reads=(given, run, priors, model))
    known = record.labels
    rows = with_labels(load_rows(given, labels=known, require_answer=False, foreign=True), known, given, whole=True)

    from scalabl.core.console import quiet
    from scalabl.inference.batch_prediction import predict_file

    quiet()

    def tell(resolved: PredictionSettings) -> None:
        _tell(resolved, record)

    done = predict_file(run, rows, written, settings, batch_size=batch_size, tell=tell, model=model, asked=asked)
    if not processes.is_main():
        return
    if done.cut is not None:
        say(f"warning: {done.cut}", stderr=True)
    if done.particles is not None:
        say(f"{len(rows):,} answers from {done.particles:.1f} of at most {samples} particles each, on average")
    if abstain is not None or max_error is not None or max_false_alarms is not None:
        expected = "" if done.error is None else f", {done.error:.1%} of them wrong by their own probabilities"
        say(f"answered   {done.answered:,} of {len(rows):,} rows ({done.answered / len(rows):.1%}){expected}")
        say(
            f"answers    {written}" + ('; "guess" is the best label beside a null' if done.answered < len(rows) else "")
        )
    if abstain is not None and done.answered == 0:
        say(f"next       the surest row's confidence is {done.surest:.3f}; lower --abstain")


def _on_this_machine(text: str) -> Path:
    from scalabl.core.locations import is_address, locate

    if not is_address(text):
        return Path(text)
    location = locate(text)
    if not isinstance(location, Path):
        raise UserError(f"{text} is of a store; add --ray local, which works on shards and on stores.")
    return location


def _predict_shards(
    record: RunRecord,
    run: Path,
    input: str,
    output: str,
    address: str,
    settings: PredictionSettings,
    format: str | None,
    batch_size: int,
    block_rows: int,
    model: str | None,
) -> None:
    from scalabl.serving.ray_address import require_ray

    require_ray()
    from scalabl.serving.batch import predict_shards

    done = predict_shards(
        run, input, output, address, settings, format=format, batch_size=batch_size, block_rows=block_rows,
        model=model, tell=lambda resolved: _tell(resolved, record),
    )  # fmt: skip
    say(f"{done.rows:,} answers to {done.shards:,} shards in {output}")
    if done.particles is not None:
        say(f"from {done.particles:.1f} of at most {settings.samples} particles each, on average")
    if done.answered < done.rows:
        say(f"answered   {done.answered:,} of {done.rows:,} rows ({done.answered / done.rows:.1%})")


def _tell(settings: PredictionSettings, record: RunRecord) -> None:
    """What auto took and why; the thresholds, what they promise, and what to expect, before rows are answered."""
    from scalabl.inference.promise import next_step
    from scalabl.inference.thresholds import describe

    if settings.why is not None:
        say(settings.why)
    for sentence in describe(settings):
        say(sentence)
    promise, threshold = settings.promise, settings.threshold
    if promise is None or threshold is None:
        return
    counts = f"{threshold.answered:,} of {threshold.rows:,} held-out rows, {threshold.wrong:,} of them wrong"
    say(f"threshold  {promise.describe(threshold)}")
    say(f"promise    {threshold.sentence}")
    if threshold.abstains:
        say(f"next       {next_step(record, threshold)}")
    say(f"expected   {threshold.coverage:.1%} of rows answered ({counts})")
