"""`scalabl inspect`: what is adapted, how many parameters, the posterior of every layer, and warnings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scalabl.cli import options
from scalabl.cli.app import app
from scalabl.core.console import quiet, words_console
from scalabl.core.errors import UserError
from scalabl.runs.record import CHOICES, RECORD, RunRecord
from scalabl.runs.registry import OVER_S

if TYPE_CHECKING:
    from rich.console import Console


_BAR = 24  # characters of the largest share


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="An adapter directory.")],
    variance: Annotated[
        bool, typer.Option("--variance", help="Measure each layer's share of the predictive variance.")
    ] = False,
    rows: Annotated[int, typer.Option(help="Validation rows that --variance is measured on.")] = 100,
    model: Annotated[str | None, typer.Option(help="The base model of --variance, if it has moved.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """What is adapted, parameter counts, mean and sigma by layer, warnings."""
    from scalabl.core.files import write_json
    from scalabl.core.outputs import require_writable
    from scalabl.runs.directory import describe_adapter, require_adapter

    if not variance:
        options.refuse_unread(inspect, "of --variance; leave it out", rows=rows, model=model)
    require_writable(json, reads=(run, model))
    require_adapter(run)
    record = RunRecord.read_finished(run) if variance or (run / RECORD).is_file() else None
    if variance:
        assert record is not None
        _check_variance(record, rows)

    from rich.table import Table
    from rich.text import Text

    from scalabl.inference.calibration import calibration_in_words

    found = describe_adapter(run)
    measured = _measured(run, rows, model) if variance else {}
    found |= measured
    if record is not None and record.calibration is not None:
        found["calibration"] = record.calibration
    if json is not None:
        write_json(json, found)
    console = words_console()
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")
    of_s = ("stochastic_modules", "stochastic_layers")
    for name in ("base_model", "target_modules", *of_s, "r", "lora_alpha", "covariance", "prior"):
        if found.get(name) is not None:
            facts.add_row(name.replace("_", " "), str(found[name]))
    facts.add_row("parameters", f"{found['lora_parameters']:,} LoRA, {found['variational_parameters']:,} variational")
    if found["kl"] is not None:
        facts.add_row("KL(q || p)", f"{found['kl']:.2f} nats")
    if record is not None and record.kind == CHOICES:
        facts.add_row("calibration", calibration_in_words(record))
    console.print(facts)
    _print_layers(found["layers"], console)
    if measured:
        _print_variance(measured, console)
    for warning in found["warnings"]:
        console.print(Text(f"warning: {warning}", "bold yellow"))


def _print_layers(layers: list[dict[str, Any]], console: Console) -> None:
    """A row a layer, without what all names begin with, so that none is broken at 80 columns."""
    from rich.table import Table
    from rich.text import Text

    shared = _shared([layer["name"] for layer in layers])
    of_s = ("mean", "sigma", "noise", "kl", "effect")
    table = Table(
        box=None, header_style="bold", title=f"layers of {shared[:-1]}" if shared else None, title_justify="left"
    )
    table.add_column("layer", overflow="fold")
    for heading in ("r", *of_s):
        table.add_column(heading.replace("kl", "KL"), justify="right", no_wrap=True)
    for layer in layers:
        figures = ("-" if layer[key] is None else f"{layer[key]:.3g}" for key in of_s)
        table.add_row(layer["name"].removeprefix(shared), str(layer["r"]), *figures)
    console.print(table)
    said = "mean and sigma of s; noise: sigma / mean; KL in nats; effect: |B diag(s) A|, the change of the layer"
    console.print(Text(said, "dim"))


def _shared(names: list[str]) -> str:
    """The modules that all names begin with, with their dots."""
    parts = os.path.commonprefix([name.split(".")[:-1] for name in names])
    return "".join(f"{part}." for part in parts)


def _check_variance(record: RunRecord, rows: int) -> None:
    if record.method not in OVER_S:
        raise UserError("--variance is of a posterior over s, which this run does not have; leave it out.")
    options.require_counts(rows=rows)


def _measured(run: Path, rows: int, model: str | None) -> dict[str, Any]:
    """`variance` (name, depth, variance, share of each layer) and `variance_top` (share -> last:K)."""
    from dataclasses import asdict

    from scalabl.inference.variance import run_variance, top_holding
    from scalabl.runs.loading import load_run

    quiet()
    found = run_variance(load_run(run, model=model), limit=rows)
    top = {f"{share:g}": top_holding(found, share) for share in (0.5, 0.9, 0.99)}
    return {"variance": [asdict(v) for v in found], "variance_top": top}


def _print_variance(measured: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in ("layer", "logit variance", "share", ""):
        right = heading in ("logit variance", "share")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    shared = _shared([layer["name"] for layer in measured["variance"]])
    largest = max(layer["share"] for layer in measured["variance"])
    for layer in measured["variance"]:
        share, name = layer["share"], layer["name"].removeprefix(shared)
        table.add_row(name, f"{layer['variance']:.3g}", f"{share:.1%}", "█" * round(_BAR * share / largest))
    console.print(table)
    top = ", ".join(f"{layers} (variance:{share})" for share, layers in measured["variance_top"].items())
    console.print(f"top layers by their share: {top}")
