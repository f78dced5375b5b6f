"""`scalabl bayesianize`: a run with a posterior from any plain LoRA and labelled rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalabl.cli.app import app, fail
from scalabl.cli.options import CHAT, MACHINE, names_in, with_line_ends
from scalabl.core.console import quiet, say, words_console
from scalabl.runs.record import RunRecord

_ROWS, _LAPLACE, _VI = "How its rows are read", "Of laplace", "Of vi"


@app.command()
def bayesianize(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A plain LoRA: of PEFT, Trainer, TRL, or a run of mle.")
    ],
    data: Annotated[str, typer.Option(help="A benchmark's name, a JSONL file, or a directory of them.")],
    output: Annotated[Path, typer.Option(help="The new run's directory.")],
    method: Annotated[str, typer.Option(help="laplace (one pass over the rows) or vi.")] = "laplace",
    model: Annotated[str | None, typer.Option(help="The base model, if the adapter does not name it.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Of a classification head, a,b,c in the order of its outputs, if no file says.", rich_help_panel=_ROWS
        ),
    ] = None,
    scoring: Annotated[
        str | None, typer.Option(help="auto, letters or continuation; a run's own by default.", rich_help_panel=_ROWS)
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help='How its rows became prompts, "{text}\\nLabel:" if left out; a run\'s own by default.',
            callback=with_line_ends,
            rich_help_panel=_ROWS,
        ),
    ] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help=CHAT, rich_help_panel=_ROWS)] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a row.", rich_help_panel=_ROWS)] = None,
    train_rows: Annotated[int | None, typer.Option(help="Take so many rows.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions at a time.")] = None,
    structure: Annotated[
        str, typer.Option(help="Of the covariance: joint, layer or diagonal.", rich_help_panel=_LAPLACE)
    ] = "joint",
    prior_precision: Annotated[
        float | None,
        typer.Option(
            help="On s relative to 1; if left out by held-out rows, without any by the evidence.",
            rich_help_panel=_LAPLACE,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.", rich_help_panel=_VI)] = None,
    variational_learning_rate: Annotated[
        float | None, typer.Option(help="For means and sigmas of s.", rich_help_panel=_VI)
    ] = None,
    prior_std: Annotated[
        float | None, typer.Option(help="Of the prior on s, relative to 1.", rich_help_panel=_VI)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.", rich_help_panel=_VI)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MACHINE)
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Load the base in 4 or 8 bit.", rich_help_panel=MACHINE)] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="Quantises for --bits: bitsandbytes or torchao (8).", rich_help_panel=MACHINE),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the run's record here too.")] = None,
) -> None:
    """Give a finished plain LoRA a posterior, without training it again."""
    from scalabl.core.files import write_json
    from scalabl.core.outputs import require_writable
    from scalabl.training.posthoc.settings import read_source, require_free, rows_for, settings_for

    source = read_source(adapter, model, names_in(labels))
    settings = settings_for(
        source, data, method, structure=structure, prior_precision=prior_precision, scoring=scoring,
        template=template, chat=chat, max_length=max_length, train_rows=train_rows, batch_size=batch_size, steps=steps,
        variational_learning_rate=variational_learning_rate, prior_std=prior_std, seed=seed, dtype=dtype, bits=bits,
        quantization=quantization,
    )  # fmt: skip
    require_free(output)
    require_writable(json, reads=(output, adapter, data, source.model))
    task, rows, held_out = rows_for(source, data, train_rows)

    from scalabl.inference.before_after import BeforeAndAfter
    from scalabl.inference.calibrate import calibration_at_the_end
    from scalabl.training.posthoc.run import bayesianize as make
    from scalabl.training.run import Interrupted

    quiet()
    judged = BeforeAndAfter()
    try:
        record = make(
            source, task, rows, held_out, output, settings, calibration_at_the_end, tell=say, judge=judged.judge
        )
    except Interrupted:
        fail("Interrupted; nothing was written.", code=130)
    if json is not None:
        write_json(json, record.as_dict())
    _print(record, output, prior_precision)
    judged.print(words_console())


def _print(record: RunRecord, output: Path, given: float | None) -> None:
    from rich.table import Table
    from rich.text import Text

    facts, table = record.bayesianized or {}, Table.grid(padding=(0, 2))
    table.add_row("run", str(output))
    table.add_row("rows", f"{record.rows['train']:,}")
    table.add_row("scoring", record.scoring_name)
    if facts["method"] == "laplace":
        table.add_row(
            "posterior",
            f"Laplace over {facts['numbers']:,} numbers together ({facts['structure']}), "
            f"{facts['effective_parameters']:.1f} of them decided by the rows",
        )
        chosen = ", chosen by the held-out rows"
        if not record.rows["validation"]:
            chosen = ", by the evidence, which may be far off; rows in validation.jsonl would choose it"
        prior = f"precision {facts['prior_precision']:.3g}, log evidence {facts['log_evidence']:.2f} nats"
        table.add_row("prior", prior + (chosen if given is None else ""))
    else:
        table.add_row("posterior", f"variational, {record.recipe['steps']} steps on mean and sigma")
    from scalabl.inference.calibration import calibration_in_words

    table.add_row("calibrated", calibration_in_words(record))
    console = words_console()
    console.print(table)
    for warning in record.warnings:
        console.print(Text(f"warning: {warning}", "bold yellow"))
