"""`scalabl inspect`: what is adapted, how many parameters, the posterior of every layer, and warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalabl.cli.main import app


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="An adapter directory.")],
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """What is adapted, parameter counts, mean and sigma by layer, warnings."""
    from scalabl.adapter_file import describe_adapter, require_adapter
    from scalabl.run_directory import RECORD, finished_record, require_writable, write_json

    require_writable(json)
    require_adapter(run)
    if (run / RECORD).is_file():
        finished_record(run)

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = describe_adapter(run)
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name in ("base_model", "target_modules", "r", "lora_alpha", "covariance", "prior"):
        if found.get(name) is not None:
            facts.add_row(name.replace("_", " "), str(found[name]))
    facts.add_row("parameters", f"{found['lora_parameters']:,} LoRA, {found['variational_parameters']:,} variational")
    if found["kl"] is not None:
        facts.add_row("KL(q || p)", f"{found['kl']:.2f} nats")
    console.print(facts)
    layers = Table(box=None, header_style="bold")
    for heading in ("layer", "r", "mean of s", "sigma", "sigma / mean", "KL", "|B diag(s) A|"):
        first = heading == "layer"
        layers.add_column(heading, justify="left" if first else "right", overflow="fold" if first else "ellipsis")
    for layer in found["layers"]:
        layers.add_row(
            layer["name"], str(layer["r"]), *(
                "-" if layer[key] is None else f"{layer[key]:.4g}" for key in ("mean", "sigma", "noise", "kl", "effect")
            )
        )  # fmt: skip
    console.print(layers)
    for warning in found["warnings"]:
        console.print(Text(f"warning: {warning}", "bold yellow"))
    if json is not None:
        write_json(json, found)
