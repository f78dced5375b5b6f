"""`scalabl plan`: memory by part, operations and the largest batch, from a model's configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scalabl.cli.app import app
from scalabl.cli.options import refuse_unread, with_settings
from scalabl.core.console import quiet, words_console
from scalabl.core.errors import UserError
from scalabl.runs.registry import METHODS, TRAINED
from scalabl.runs.settings import ALL_LINEAR, AdapterSettings, Settings, make_settings

if TYPE_CHECKING:
    from scalabl.planning.plan import Plan


_BATCH = 4  # the paper's
_METHODS = [name for name in TRAINED if METHODS[name].plannable]
# what a plan depends on, where its option has another name or help than that of scalabl train
_SETTINGS: dict[str, dict[str, str]] = {
    "model": {"help": "A Hub id, smollm2-135m-instruct, or a directory with a config.json."},
    "target_modules": {"names": "--targets,--target-modules", "help": "For example q_proj,v_proj,lm_head."},
    "layers": {}, "r": {}, "covariance": {}, "dtype": {}, "quantization": {},
    "method": {"help": f"{', '.join(_METHODS[:-1])} or {_METHODS[-1]}. Default: {Settings.method}."},
    "optimizer": {},
    "bits": {"help": "Of the base's weights: 16 (as in --dtype), 8 or 4."},
    "batch_size": {"names": "--batch,--batch-size", "help": "Rows a step; 4 where there is no recipe."},
    "max_length": {"names": "--seq,--max-length"},
    "gradient_checkpointing": {},
}  # fmt: skip


@app.command()
@with_settings(_SETTINGS)
def plan(
    given: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="A recipe (YAML) of scalabl train; options win.")] = None,
    card: Annotated[str | None, typer.Option(help="A GPU's memory, for example 24GB; else this machine's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where --card is given.")] = None,
    samples: Annotated[int, typer.Option(help="N of the predictions.")] = 10,
    scored: Annotated[
        int, typer.Option(help="Tokens of a row whose logits are read, of all its choices together.")
    ] = 32,
    loss: Annotated[
        str | None,
        typer.Option(help="letters, continuation, head, or tokens: of every token, plain fine-tuning."),
    ] = None,
    labels: Annotated[int, typer.Option(help="Of a classification head, an encoder's loss.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Memory, operations and the largest batch of a training, before any weight is read."""
    from scalabl.core.files import write_json
    from scalabl.core.outputs import require_writable
    from scalabl.planning.memory import machine_device, machine_memory, parse_bytes

    if config is None and given["batch_size"] is None:
        given["batch_size"] = _BATCH
    unquantised = given["bits"] == 16
    settings = make_settings(given | {"bits": None if unquantised else given["bits"]}, config)
    if unquantised:
        settings = settings.changed(bits=None, quantization="bitsandbytes")
    for name, value, least in (("scored", scored, 1), ("samples", samples, 1), ("labels", labels, 2)):
        if value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}.")
    if loss not in (None, "letters", "continuation", "head", "tokens"):
        raise UserError(f"--loss is {loss!r}; it must be letters, continuation, head or tokens.")
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device is {device!r}; it must be cpu or cuda.")
    size = None if card is None else parse_bytes(card)
    require_writable(json, reads=(config, settings.model))

    device = device or ("cuda" if card is not None else machine_device())
    if size is None:
        if device == "cuda" and machine_device() != "cuda":
            raise UserError("This machine has no cuda; say how much memory there is with --card, as in 24GB.")
        size = machine_memory(device)

    from scalabl.planning.plan import make_plan
    from scalabl.planning.step import PlannedRows
    from scalabl.runs.models import is_encoder

    quiet()
    if is_encoder(settings.model):
        if loss not in (None, "head"):
            raise UserError(f"{settings.model} is an encoder, which has no {loss}; leave out --loss.")
        loss = "head"
    read = loss or (settings.rows.scoring if settings.rows.scoring in ("letters", "head") else "continuation")
    if read != "head":
        refuse_unread(plan, f"of a head, and the loss is {read}; leave it out", labels=labels)
    if read != "continuation":
        refuse_unread(plan, f"of continuations, and the loss is {read}; leave it out", scored=scored)
    size_of = {"choices": labels} if read == "head" else {"scored": scored}
    rows = PlannedRows(settings.optimisation.batch_size, settings.rows.max_length, loss=read, **size_of)
    with words_console(stderr=True).status("planning"):
        made = make_plan(settings, rows, device=device, card=size, samples=samples)
    if json is not None:
        write_json(json, made.as_dict())
    _print(made, words_console())


def _print(made: Plan, console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from scalabl.planning.memory import in_words
    from scalabl.runs.models import is_encoder

    adapter = made.settings.adapter
    settings, rows, counts = made.settings, made.rows, made.counts
    plain, saved = made.training[False], made.training[True]
    drawn, mean = made.prediction[made.samples], made.prediction[0]
    columns = (plain, saved, drawn, mean)
    bits = (
        ""
        if settings.machine.bits is None
        else f", weights of {settings.machine.bits} bit ({settings.machine.quantization})"
    )
    facts = Table.grid(padding=(0, 2))
    facts.add_row("model", Text(f"{settings.model}, {made.dtype} on {made.device}{bits}"))
    default = adapter.target_modules == AdapterSettings.target_modules
    targets = ALL_LINEAR if default and is_encoder(settings.model) else adapter.target_modules
    facts.add_row("adapter", f"{settings.method}, r = {adapter.r}, {targets}, layers {adapter.layers}")
    numbers = f"{counts.base:,} base, {counts.lora:,} LoRA, {counts.variational:,} variational"
    facts.add_row("parameters", numbers)
    facts.add_row("memory", in_words(made.card))
    facts.add_row("rows", f"{rows.batch} of {rows.length} tokens, logits of {_positions(made)}")
    console.print(facts)

    table = Table(box=None, header_style="bold")
    n = f"N\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{made.samples}"
    for heading in ("", "training", "with checkpointing", f"prediction, {n}", "its mean"):
        table.add_column(heading, justify="right" if heading else "left")
    shared = (("weights", counts.weights), ("adapter", counts.adapter))
    for name, size in shared:
        table.add_row(name, *[in_words(size)] * 4)
    for name, size in (("gradients", counts.gradients), ("optimiser", made.optimizer)):
        table.add_row(name, *[in_words(size)] * 2, "", "")
    table.add_row("activations", *(in_words(part.activations) for part in columns))
    table.add_row("temporary", in_words(plain.temporary), in_words(saved.temporary), "", "")
    table.add_row("peak", *(in_words(part.peak) for part in columns), style="bold", end_section=True)
    table.add_row("operations", *(f"{part.flops / 1e12:,.3g} TFLOP" for part in columns))
    largest = made.largest
    batches = [largest[name] for name in ("training", "training_checkpointed", "prediction")]
    table.add_row("largest batch", *map(_at_most, batches), "")
    console.print(table)
    particles = made.particles
    if made.cache:
        console.print(
            f"Generation keeps {in_words(made.cache)} of keys and values for {rows.batch} rows of {rows.length} tokens"
            + (f" and {particles} particles each." if particles > 1 else ".")
        )
    fits = made.peak <= made.card
    console.print(Text(_fits(made) if fits else _does_not_fit(made), "" if fits else "bold yellow"))


def _fits(made: Plan) -> str:
    from scalabl.planning.memory import in_words

    largest = made.largest["training_checkpointed" if made.settings.optimisation.gradient_checkpointing else "training"]
    room = f", and so do up to {_at_most(largest)} rows a step" if largest > made.rows.batch else ""
    return f"fits: {in_words(made.peak)} of {in_words(made.card)} at {made.rows.batch} rows a step{room}."


def _does_not_fit(made: Plan) -> str:
    from scalabl.planning.memory import in_words
    from scalabl.planning.refusal import savings

    said = f"does not fit: {in_words(made.peak)} of {in_words(made.card)}; "
    found = savings(made.settings, made.rows, made.peak, made.device)
    enough = [f"{option} ({in_words(left)})" for left, option in reversed(found) if left <= made.card]
    if enough:
        return f"{said}do this: {' or '.join(enough[:3])}."
    if found:
        several = ", ".join(f"{option} ({in_words(left)})" for left, option in found[:3])
        return f"{said}no one setting is enough; combine several of {several}, or take a larger card."
    return f"{said}take a smaller model, or a larger card."


def _positions(made: Plan) -> str:
    return {
        "letters": "the last token",
        "continuation": f"{made.rows.in_a_row} tokens a row",
        "tokens": "every token",
        "head": f"{made.rows.choices} labels",
    }[made.rows.loss]


def _at_most(batch: int) -> str:
    from scalabl.planning.plan import LARGEST

    return f"{batch:,} or more" if batch == LARGEST else f"{batch:,}"
