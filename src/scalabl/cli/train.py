"""`scalabl train`: a run directory from a model, rows and a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from scalabl.cli.app import app, fail
from scalabl.core import processes
from scalabl.runs.record import RunRecord
from scalabl.runs.settings import Settings, make_settings


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="The run's directory; the same command resumes it.")],
    model: Annotated[str | None, typer.Option(help="A directory, a Hub id, or smollm2-135m-instruct.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A benchmark or nq-open, triviaqa, sciq; a JSONL file, or a directory of them.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe (YAML) of these settings; options win.")] = None,
    method: Annotated[str | None, typer.Option(help="scalabl, mle, map, mc_dropout, blob or monteclora.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions a step and device.")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Batches a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="For A and B.")] = None,
    variational_learning_rate: Annotated[float | None, typer.Option(help="For means and sigmas of s.")] = None,
    beta: Annotated[float | None, typer.Option(help="Multiplies the KL; 1 is the exact ELBO.")] = None,
    kl_normalization: Annotated[
        str | None, typer.Option(help="Of rows of text: KL / trained tokens (token, exact) or rows (sequence).")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="Of the KL's weight: elbo, warmup or minibatch.")] = None,
    covariance: Annotated[str | None, typer.Option(help="diagonal or full.")] = None,
    prior_mean: Annotated[float | None, typer.Option(help="Of the prior on each s; 0.577 is where s begins.")] = None,
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
    bits: Annotated[int | None, typer.Option(help="Load the base in 4 or 8 bit.")] = None,
    quantization: Annotated[str | None, typer.Option(help="Of --bits: bitsandbytes or torchao (8 bit).")] = None,
    optimizer: Annotated[str | None, typer.Option(help="As Trainer names it, for example paged_adamw_8bit.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory.")
    ] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    ignore_memory: Annotated[bool, typer.Option("--ignore-memory", help="Begin even if it cannot fit.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the run's record here too.")] = None,
) -> None:
    """Train a LoRA adapter with a posterior (or without, --method mle)."""
    given = {k: v for k, v in locals().items() if k not in ("output", "config", "ignore_memory", "json")}
    from scalabl.core.files import require_writable, write_json
    from scalabl.data.load import load_training_task
    from scalabl.runs.directory import claim, hold

    settings = make_settings(given, config)
    require_writable(json, unlike=(output,))
    load_training_task(settings.data)
    finished = processes.on_main(lambda: claim(output, settings, processes.world_size()))
    if finished:
        record = processes.on_main(lambda: RunRecord.read_finished(output))
    else:
        held = processes.on_main(lambda: hold(output))
        try:
            record = _train(settings, output, ignore_memory)
        finally:
            if held is not None and processes.is_main():
                os.close(held)
    if not processes.is_main():
        return
    if json is not None:
        write_json(json, record.as_dict())
    _print(record, output)


def _train(settings: Settings, output: Path, ignore_memory: bool) -> RunRecord:
    try:
        from scalabl.core.quiet import quiet
        from scalabl.training.run import Interrupted, train

        quiet()
        _plan(settings, ignore_memory)
        try:
            return train(settings, output)
        except Interrupted as stopped:
            fail(f"Interrupted, {stopped}; run the same command again to go on.", code=130)
    finally:
        # whatever stopped it before it could write anything (Ctrl-C while torch is imported)
        if processes.is_main() and output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _plan(settings: Settings, ignore_memory: bool) -> None:
    """Say what the run takes, and refuse one that cannot fit; whole models alone are planned, no shards of one."""
    if processes.is_sharded() or processes.uses_deepspeed():
        return
    from scalabl.planning.plan import CannotPlanError
    from scalabl.planning.refusal import plan_run

    def said() -> str:
        try:
            return plan_run(settings, ignore_memory=ignore_memory).in_words()
        except CannotPlanError as error:
            return f"memory: not planned. {error}"

    line = processes.on_main(said)
    if processes.is_main():
        typer.echo(line)


def _print(record: RunRecord, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    parameters = record.parameters
    for name, value in (
        ("run", str(output)),
        ("rows", f"{record.rows['train']:,} trained on, {record.rows['validation']:,} held out"),
        ("scoring", record.scoring_name + _why(record.scoring_nll)),
        ("tokens", _tokens(record)),
        ("parameters", f"{parameters['lora']:,} LoRA, {parameters['variational']:,} variational"),
    ):
        if value:
            table.add_row(name, value)
    console = Console()
    console.print(table)
    for warning in record.warnings:
        console.print(Text(f"warning: {warning}", "bold yellow"))


def _tokens(record: RunRecord) -> str:
    counts = record.tokens
    if counts is None:
        return ""
    said = f"{counts['trained']:,} trained on of {counts['all']:,}"
    if counts["cut_rows"]:
        longest = record.recipe["max_length"]
        said += f"; {counts['cut_rows']:,} rows longer than {longest:,} lost the beginning of their prompt"
    return said


def _why(nll: dict[str, float]) -> str:
    if not nll:
        return ""
    return ", chosen by NLL on held-out rows before training: " + ", ".join(f"{k} {v:.3f}" for k, v in nll.items())
