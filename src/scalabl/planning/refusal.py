"""A training that cannot fit is refused before its weights are read, with what would make it fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from scalabl.errors import UserError
from scalabl.planning.memory import in_words
from scalabl.planning.meta_model import read_config
from scalabl.planning.plan import Planner
from scalabl.planning.rows import Rows
from scalabl.training.recipe import Recipe, layer_fraction

_LEAST = 0.02  # of the peak: what saves less is not worth naming


def refuse_what_cannot_fit(recipe: Recipe, rows: Rows, peak: int, *, device: str, memory: int) -> None:
    """Refuse a training whose peak is more than there is.

    Args:
        recipe: what is to be trained.
        rows: what its batches are like.
        peak: its bytes, as planned.
        device: "cpu" or "cuda".
        memory: bytes that there are.

    Raises:
        UserError: it names each setting that would help, with the peak that it would leave, the smallest first.
    """
    if peak <= memory:
        return
    helps = [f"{change} ({in_words(left)})" for left, change in savings(recipe, rows, peak, device)]
    lower = f"change one or several of {', '.join(helps)}" if helps else "take a smaller model"
    where = "this GPU has" if device == "cuda" else "are available"
    raise UserError(
        f"This training needs about {in_words(peak)} of memory, but {in_words(memory)} {where}; {lower}, or try it all "
        "the same with --ignore-memory."
    )


def savings(recipe: Recipe, rows: Rows, peak: int, device: str) -> list[tuple[int, str]]:
    """What would lower a peak: (the peak that it leaves, the option as one types it), what helps most first."""
    found = []
    for changed, fewer, option in _changes(recipe, rows, device):
        try:
            left = Planner(changed, device).training(fewer).peak
        except UserError:  # a setting that this model does not take
            continue
        if left < peak * (1 - _LEAST):
            found.append((left, option))
    return sorted(found)


def _changes(recipe: Recipe, rows: Rows, device: str) -> Iterator[tuple[Recipe, Rows, str]]:
    def change(option: str, **settings: Any) -> tuple[Recipe, Rows, str]:
        return replace(recipe, **settings), rows, option

    if rows.batch > 1:
        half = rows.batch // 2
        yield recipe, replace(rows, batch=half), f"--batch-size {half}"
    if rows.length > 1:
        shorter = math.ceil(rows.length / 2)
        fewer = replace(rows, length=shorter, stored=rows.stored * shorter // rows.length)
        yield recipe, fewer, f"--max-length {shorter}"
    if not recipe.gradient_checkpointing:
        yield replace(recipe, gradient_checkpointing=True), replace(rows, stored=0), "--gradient-checkpointing"
    if recipe.bits is None:
        yield change("--bits 8", bits=8)
    if recipe.bits != 4:
        yield change("--bits 4", bits=4, quantization="bitsandbytes")
    if recipe.dtype == "float32" or (recipe.dtype == "auto" and device == "cpu"):
        yield change("--dtype bfloat16", dtype="bfloat16")
    number = layer_fraction(recipe.layers) or read_config(recipe.model).get_text_config().num_hidden_layers
    if number > 1:
        yield change(f"--layers last:{number // 2}", layers=f"last:{number // 2}")
    if recipe.r > 1:
        yield change(f"--rank {recipe.r // 2}", r=recipe.r // 2)
    if "8bit" not in recipe.optimizer:
        yield change("--optimizer adamw_8bit", optimizer="adamw_8bit")
