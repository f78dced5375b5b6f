"""`scalabl train`: a run directory from a model, rows and a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scalabl.cli.app import app, fail
from scalabl.cli.options import with_settings
from scalabl.core import processes
from scalabl.core.console import say, words_console
from scalabl.runs.record import CHOICES, RunRecord
from scalabl.runs.settings import DEFAULTS, Settings, make_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from scalabl.data.example import Task
    from scalabl.data.text_rows import TextTask


@app.command()
@with_settings()
def train(
    given: dict[str, Any],
    output: Annotated[Path, typer.Option(help="The run's directory; the same command resumes it.")],
    config: Annotated[Path | None, typer.Option(help="A recipe (YAML) of these settings; options win.")] = None,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Begin even if it cannot fit.", rich_help_panel="Machine")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Write the run's record here too.", rich_help_panel="Machine")
    ] = None,
) -> None:
    """Train a LoRA adapter with a posterior (or without, --method mle)."""
    from scalabl.core.files import write_json
    from scalabl.core.outputs import require_writable
    from scalabl.data.load import load_training_task
    from scalabl.runs.directory import claim, lock_directory

    settings = make_settings(given, config)
    require_writable(json, reads=(output, settings.data, settings.model, config))
    task = load_training_task(settings.data)
    if processes.on_main(lambda: claim(output, settings, processes.world_size())):
        record = RunRecord.of_main(lambda: RunRecord.read_finished(output))
    else:
        lock = processes.on_main(lambda: lock_directory(output))
        try:
            record = _train(settings, output, task, ignore_memory)
        finally:
            if lock is not None and processes.is_main():
                os.close(lock)
    if not processes.is_main():
        return
    if json is not None:
        write_json(json, record.as_dict())
    _print(record, output)


def _train(settings: Settings, output: Path, task: Task | TextTask, ignore_memory: bool) -> RunRecord:
    try:
        from scalabl.core.console import quiet
        from scalabl.inference.calibrate import calibration_at_the_end
        from scalabl.training.run import Interrupted, train

        quiet()
        tokenizer = _plan(settings, task, ignore_memory)
        try:
            return train(settings, output, task=task, tokenizer=tokenizer, calibrate=calibration_at_the_end, tell=say)
        except Interrupted as stopped:
            fail(f"Interrupted, {stopped}; run the same command again to go on.", code=130)
    finally:
        # whatever stopped it before it could write anything (Ctrl-C while torch is imported)
        if processes.is_main() and output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _plan(settings: Settings, task: Task | TextTask, ignore_memory: bool) -> PreTrainedTokenizerBase | None:
    """Print what the run takes, and refuse one that cannot fit; whole models alone are planned, no shards of one.

    Returns:
        the tokenizer, where this process has loaded it.
    """
    if processes.is_sharded() or processes.uses_deepspeed():
        return None
    from scalabl.planning.plan import CannotPlanError
    from scalabl.planning.refusal import plan_run
    from scalabl.runs.models import load_tokenizer

    loaded: list[PreTrainedTokenizerBase] = []

    def line() -> str:
        try:
            loaded.append(load_tokenizer(settings.model))
            return plan_run(settings, task, loaded[0], ignore_memory=ignore_memory).in_words()
        except CannotPlanError as error:
            return f"memory: not planned. {error}"

    if processes.is_main():
        say(_in_short(settings))
    planned = processes.on_main(line)
    if processes.is_main():
        say(planned)
    return loaded[0] if loaded else None


def _in_short(settings: Settings) -> str:
    """What is trained on what, and which of it nobody chose."""
    chosen = {name: str(getattr(settings, name)) for name in ("model", "data")}
    model, data = (
        f"{value} (the default; --{name} names another)" if value == DEFAULTS[name] else value
        for name, value in chosen.items()
    )
    fit = settings.optimisation
    steps = f"{fit.steps:,} steps of {fit.batch_size * fit.gradient_accumulation:,} rows"
    return f"training: {settings.method} on {model}, rows of {data}, {steps}, learning rate {fit.learning_rate:g}"


def _print(record: RunRecord, output: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from scalabl.inference.calibration import calibration_in_words

    table = Table.grid(padding=(0, 2))
    parameters = record.parameters
    for name, value in (
        ("run", str(output)),
        ("rows", f"{record.rows['train']:,} trained on, {record.rows['validation']:,} held out"),
        ("scoring", record.scoring_name + _why(record.scoring_nll)),
        ("tokens", _tokens(record)),
        ("parameters", f"{parameters['lora']:,} LoRA, {parameters['variational']:,} variational{_of_head(parameters)}"),
        ("calibrated", calibration_in_words(record) if record.kind == CHOICES else ""),
    ):
        if value:
            table.add_row(name, value)
    console = words_console()
    console.print(table)
    for warning in record.warnings:
        console.print(Text(f"warning: {warning}", "bold yellow"))


def _of_head(parameters: dict[str, int]) -> str:
    return f", {parameters['head']:,} of the head" if "head" in parameters else ""


def _tokens(record: RunRecord) -> str:
    counts = record.tokens
    if counts is None:
        return ""
    text = f"{counts['trained']:,} trained on of {counts['all']:,}"
    if counts["cut_rows"]:
        longest = record.recipe["max_length"]
        text += f"; {counts['cut_rows']:,} rows longer than {longest:,} lost the beginning of their prompt"
    return text


def _why(nll: dict[str, float]) -> str:
    if not nll:
        return ""
    shown = {f"{value:.3f}" for value in nll.values()}
    if len(nll) > 1 and len(shown) == 1:
        return f"; held-out NLL {shown.pop()} before training under all of {', '.join(nll)}: the first is taken"
    return ", chosen by NLL on held-out rows before training: " + ", ".join(f"{k} {v:.3f}" for k, v in nll.items())
