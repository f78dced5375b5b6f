"""`scalabl train`: a run directory from a model, rows and a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalabl.cli.main import app


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="The run's directory; the same command resumes it.")],
    model: Annotated[str | None, typer.Option(help="A directory, a Hub id, or smollm2-135m-instruct.")] = None,
    data: Annotated[str | None, typer.Option(help="A benchmark's name, a JSONL file, or a directory of them.")] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe (YAML) of these settings; options win.")] = None,
    method: Annotated[str | None, typer.Option(help="scalabl or mle (plain LoRA).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions a step and device.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Batches a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="For A and B.")] = None,
    variational_learning_rate: Annotated[float | None, typer.Option(help="For means and sigmas of s.")] = None,
    beta: Annotated[float | None, typer.Option(help="Multiplies the KL; 1 is the exact ELBO.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Of the KL's weight: elbo, warmup or minibatch.")] = None,
    covariance: Annotated[str | None, typer.Option(help="diagonal or full.")] = None,
    prior_std: Annotated[float | None, typer.Option(help="Of the prior on each s.")] = None,
    r: Annotated[int | None, typer.Option("--rank", "-r", help="LoRA's rank.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA's alpha.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="For example q_proj,v_proj.")] = None,
    layers: Annotated[str | None, typer.Option(help="all, or last:K.")] = None,
    scoring: Annotated[str | None, typer.Option(help="auto, letters or continuation.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the chat template.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a row.")] = None,
    train_rows: Annotated[int | None, typer.Option(help="Take so many training rows.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initialisation, order and draws.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    bits: Annotated[int | None, typer.Option(help="Load the base in 4 or 8 bit (bitsandbytes).")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory.")
    ] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the run's record here too.")] = None,
) -> None:
    """Train a LoRA adapter with a posterior (or without, --method mle)."""
    settings = {k: v for k, v in locals().items() if k not in ("output", "config", "json")}
    from scalabl.run_directory import claim, write_json
    from scalabl.tasks import load_task
    from scalabl.training.recipe import make_recipe

    recipe = make_recipe(settings, config)
    load_task(recipe.data)
    made = not output.exists()
    claim(output, recipe.as_dict())
    try:
        from scalabl.cli.quiet import quiet
        from scalabl.training.run import Interrupted
        from scalabl.training.run import train as run_training

        quiet()
        record = run_training(recipe, output)
    except Interrupted as stopped:
        typer.echo(f"scalabl: Interrupted, {stopped}; run the same command again to go on.", err=True)
        raise typer.Exit(130) from stopped
    finally:
        if made and output.is_dir() and not any(output.iterdir()):
            output.rmdir()
    if json is not None:
        write_json(json, record)
    _print(record, output)


def _print(record: dict, output: Path) -> None:  # type: ignore[type-arg]
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    parameters = record["parameters"]
    for name, value in (
        ("run", str(output)),
        ("rows", f"{record['rows']['train']:,} trained on, {record['rows']['validation']:,} held out"),
        ("scoring", record["scoring_name"] + _why(record["scoring_nll"])),
        ("parameters", f"{parameters['lora']:,} LoRA, {parameters['variational']:,} variational"),
    ):
        table.add_row(name, value)
    Console().print(table)


def _why(nll: dict[str, float]) -> str:
    if not nll:
        return ""
    return ", chosen by NLL on held-out rows before training: " + ", ".join(f"{k} {v:.3f}" for k, v in nll.items())
