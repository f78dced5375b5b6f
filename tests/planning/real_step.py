"""The same step on the meta device and with numbers, and the bytes that autograd saves in each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny_base import tiny_base
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from scalabl.planning.meta_model import build
from scalabl.planning.step import MetaRun, PlannedRows, training_loss
from scalabl.runs.method import load_method
from scalabl.runs.models import load_base, read_config
from scalabl.runs.settings import Settings, make_settings
from scalabl.scoring.trunk import Trunk

ROWS = PlannedRows(3, 24, scored=8, choices=3)


def settings_of(architecture: str = "llama", *, depth: int = 3, **changes: Any) -> Settings:
    """A recipe on a tiny base."""
    base = str(tiny_base(architecture, layers=depth))
    return make_settings({"model": base, "r": 4, "batch_size": ROWS.batch, "dtype": "float32", **changes})


def meta_run(settings: Settings, device: str = "cpu") -> MetaRun:
    """Its model on the meta device."""
    model, _ = build(settings, read_config(settings.model), device)
    return MetaRun.of(model, settings, device)


def real_model(settings: Settings) -> PeftModel:
    """Its model with numbers."""
    base, _ = load_base(settings.model, **settings.machine.of_base)
    model: Any = get_peft_model(base, load_method(settings.method).adapter_config(settings, base))
    if settings.optimisation.gradient_checkpointing:
        plain = model.get_base_model()
        getattr(plain, "activation_checkpointing_enable", plain.gradient_checkpointing_enable)()
    return model.train()


class Saved:
    """What autograd saves for the backward pass: storages by their identity, those of some tensors left out."""

    def __init__(self, left_out: list[Tensor]) -> None:
        self._left_out = {tensor.untyped_storage()._cdata for tensor in left_out}
        self.tensors: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> None:
        """One of them."""
        key = tensor.untyped_storage()._cdata
        if key not in self._left_out:
            self.tensors[key] = tensor

    def bytes(self, *, floating: bool = False) -> int:
        """Of all of them, or of floating point ones alone."""
        kept = [t for t in self.tensors.values() if t.is_floating_point() or not floating]
        return sum(t.untyped_storage().nbytes() for t in kept)


@contextmanager
def saving(left_out: list[Tensor]) -> Iterator[Saved]:
    """Within it, what autograd saves is kept note of."""
    saved = Saved(left_out)

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def state(model: PeftModel) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def saved_by_the_real_step(
    settings: Settings, rows: PlannedRows, *, attention: str = "sdpa", autocast: bool = False
) -> Saved:
    """One forward pass with numbers, as a run has it."""
    model = real_model(settings)
    model.get_base_model().set_attn_implementation(attention)
    inputs = rows.of(rows.batch)
    trunk = None if settings.optimisation.gradient_checkpointing else Trunk(model)
    if trunk is not None and trunk.depth and rows.loss != "tokens":
        with torch.no_grad():
            inputs.trunk = trunk.encode(model.eval(), inputs)
        model.train()
    with saving(state(model)) as saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        training_loss(model, inputs, inputs, trunk, rows)
    return saved
