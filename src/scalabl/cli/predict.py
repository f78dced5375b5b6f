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


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")],
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
    abstain: Annotated[float | None, typer.Option(help="Answer null below this confidence.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Promise this error rate among answers; null where it could not be kept.")
    ] = None,
    score: Annotated[
        str, typer.Option(help="Of --max-error: what makes a row sure, probability, entropy or epistemic.")
    ] = "probability",
    guarantee: Annotated[
        str, typer.Option(help="Of --max-error: exact, or conformal (of all rows, on average).")
    ] = "exact",
    max_false_alarms: Annotated[
        float | None, typer.Option(help="Answer null out of scope, at this share of false alarms among rows in scope.")
    ] = None,
    oos_score: Annotated[
        str | None,
        typer.Option(
            help="Of --max-false-alarms: distance (where the run has one), entropy, probability, energy or epistemic."
        ),
    ] = None,
    coverage: Annotated[
        float | None, typer.Option(help="Give the set of labels that holds the right one at this rate.")
    ] = None,
    set_score: Annotated[str, typer.Option(help="Of --coverage: lac (the smallest sets), aps or raps.")] = "lac",
    per_class: Annotated[bool, typer.Option("--per-class", help="Of --coverage: at that rate in each class.")] = False,
    model: options.BaseModel = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Use a Ray cluster that shares the files: its address, auto, or local."),
    ] = None,
    format: Annotated[str | None, typer.Option(help="Of --ray: jsonl or parquet; as the rows are.")] = None,
    block_rows: Annotated[int, typer.Option(help="Of --ray: rows that a worker answers at a time.")] = 512,
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
    record = read_classifier(run, model=model)
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
        _predict_shards(run, input, output, ray, settings, format, batch_size, block_rows, model)
        return
    if format is not None:
        raise UserError("--format is for --ray; without it the answers are JSONL.")
    given, written = _on_this_machine(input), _on_this_machine(output)
    require_writable(written, reads=(given, run, priors, model))
    labels = record.labels
    rows = with_labels(load_rows(given, labels=labels, require_answer=False), labels, given)

    from scalabl.core.console import quiet
    from scalabl.inference.batch_prediction import predict_file

    quiet()
    done = predict_file(run, rows, written, settings, batch_size=batch_size, tell=_tell, model=model)
    if not processes.is_main():
        return
    if done.cut is not None:
        say(f"warning: {done.cut}", stderr=True)
    if done.particles is not None:
        say(f"{len(rows):,} answers from {done.particles:.1f} of at most {samples} particles each, on average")
    if max_error is not None or max_false_alarms is not None:
        share = done.answered / len(rows)
        say(f"answered   {done.answered:,} of {len(rows):,} rows ({share:.1%}) in {written}")


def _on_this_machine(text: str) -> Path:
    from scalabl.core.locations import is_address, locate

    if not is_address(text):
        return Path(text)
    location = locate(text)
    if not isinstance(location, Path):
        raise UserError(f"{text} is of a store; add --ray local, which works on shards and on stores.")
    return location


def _predict_shards(
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
        model=model, tell=_tell,
    )  # fmt: skip
    say(f"{done.rows:,} answers to {done.shards:,} shards in {output}")
    if done.particles is not None:
        say(f"from {done.particles:.1f} of at most {settings.samples} particles each, on average")
    if done.answered < done.rows:
        say(f"answered   {done.answered:,} of {done.rows:,} rows ({done.answered / done.rows:.1%})")


def _tell(settings: PredictionSettings) -> None:
    """What auto took and why; the thresholds, what they promise, and what to expect, before rows are answered."""
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
    say(f"expected   {threshold.coverage:.1%} of rows answered ({counts})")
