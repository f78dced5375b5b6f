"""`scalabl train`: a run directory from a model, rows and a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from scalabl.cli.main import app, fail
from scalabl.training.recipe import Recipe, make_recipe


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="The run's directory; the same command resumes it.")],
    model: Annotated[str | None, typer.Option(help="A directory, a Hub id, or smollm2-135m-instruct.")] = None,
    data: Annotated[str | None, typer.Option(help="A benchmark's name, a JSONL file, or a directory of them.")] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe (YAML) of these settings; options win.")] = None,
    method: Annotated[str | None, typer.Option(help="scalabl, mle, map, mc_dropout, blob or monteclora.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions a step and device.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Batches a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="For A and B.")] = None,
    variational_learning_rate: Annotated[float | None, typer.Option(help="For means and sigmas of s.")] = None,
    beta: Annotated[float | None, typer.Option(help="Multiplies the KL; 1 is the exact ELBO.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Of the KL's weight: elbo, warmup or minibatch.")] = None,
    covariance: Annotated[str | None, typer.Option(help="diagonal or full.")] = None,
    prior_std: Annotated[float | None, typer.Option(help="Of the prior on each s.")] = None,
    empirical_prior: Annotated[
        bool | None, typer.Option("--empirical-prior/--no-empirical-prior", help="Fit each layer's prior std.")
    ] = None,
    stochastic_modules: Annotated[str | None, typer.Option(help="Draw s in these alone, for example v_proj.")] = None,
    stochastic_layers: Annotated[str | None, typer.Option(help="Draw s in these alone: last:K, last:0.25.")] = None,
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
    from scalabl.run_directory import claim, finished_record, require_writable, write_json
    from scalabl.tasks import load_task

    recipe = make_recipe(settings, config)
    require_writable(json)
    load_task(recipe.data)
    finished = claim(output, recipe.as_dict())
    record = finished_record(output) if finished else _train(recipe, output)
    if json is not None:
        write_json(json, record)
    _print(record, output)


def _train(recipe: Recipe, output: Path) -> dict[str, Any]:
    try:
        from scalabl.cli.quiet import quiet
        from scalabl.training.run import Interrupted, train

        quiet()
        try:
            return train(recipe, output)
        except Interrupted as stopped:
            fail(f"Interrupted, {stopped}; run the same command again to go on.", code=130)
    finally:
        # whatever stopped it before it could write anything (Ctrl-C while torch is imported)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _print(record: dict, output: Path) -> None:  # type: ignore[type-arg]
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    parameters = record["parameters"]
    for name, value in (
        ("run", str(output)),
        ("rows", f"{record['rows']['train']:,} trained on, {record['rows']['validation']:,} held out"),
        ("scoring", record["scoring_name"] + _why(record["scoring_nll"])),
        ("parameters", f"{parameters['lora']:,} LoRA, {parameters['variational']:,} variational"),
    ):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for warning in record.get("warnings", []):
        console.print(Text(f"warning: {warning}", "bold yellow"))


def _why(nll: dict[str, float]) -> str:
    if not nll:
        return ""
    return ", chosen by NLL on held-out rows before training: " + ", ".join(f"{k} {v:.3f}" for k, v in nll.items())
