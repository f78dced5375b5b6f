"""`scalabl export`: particles of a run as plain LoRAs, and the line that serves them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalabl.cli import options
from scalabl.cli.app import app
from scalabl.core.console import say


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory with a posterior.")],
    particles: Annotated[int, typer.Option(help="How many plain LoRAs.")],
    output: Annotated[Path | None, typer.Option(help="Their directory OUT; DIR itself if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Of the particles.")] = 0,
    draws: Annotated[str, typer.Option(help="independent, antithetic, sobol or moments.")] = "independent",
    name: Annotated[str, typer.Option(help="They are served as NAME-0, NAME-1, ...")] = "particle",
    raw: options.Raw = False,
    model: Annotated[str | None, typer.Option(help="The base model on the server, if it lies elsewhere.")] = None,
    host: Annotated[str, typer.Option(help="Of the printed command: where the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the printed command.")] = 8000,
) -> None:
    """Write N particles as plain LoRAs into OUT/particles, and print the vllm serve line where vLLM loads them.

    The same call again writes nothing and prints the line.
    """
    from scalabl.serving.manifest import MAX_LORA_RANKS, as_shell, prepare, vllm_command

    prepare(run, particles, output or run, seed=seed, draws=draws, name=name, raw=raw)

    from scalabl.core.console import quiet, quiet_imports

    quiet_imports()
    from scalabl.serving.export import export as write

    quiet()
    manifest = write(run, particles, output, seed=seed, draws=draws, name=name, raw=raw)
    directory = (output or run) / "particles"
    say(f"{particles:,} particles in {directory}")
    for warning in manifest.warnings:
        say(f"warning: {warning}")
    served = not manifest.head or manifest.head_labels is not None
    if served and (model or manifest.base_model) and manifest.rank <= MAX_LORA_RANKS[-1]:
        say(as_shell(vllm_command(manifest, directory, base=model, host=host, port=port)))
