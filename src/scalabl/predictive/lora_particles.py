"""Particles in a LoRA layer that has no posterior of its own: noise on A, or masks of A's input, a particle a row.

Rows i B .. (i + 1) B - 1 of a batch of N B rows carry particle i in every layer, as `scalabl.particles` has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scalabl.errors import UserError
from scalabl.tuner.layers import active_adapters, unwrap


@dataclass(frozen=True)
class LoraParts:
    """One adapted layer: y = W0 x + scaling B A x.

    Attributes:
        down: the module of A, (r, d_in) its weight.
        up: the module of B, (d_out, r) its weight.
        scaling: alpha / r.
    """

    down: nn.Module
    up: nn.Module
    scaling: float

    @property
    def a(self) -> Tensor:
        return self.down.weight  # type: ignore[return-value]

    @property
    def b(self) -> Tensor:
        return self.up.weight  # type: ignore[return-value]


def lora_parts(model: nn.Module) -> dict[str, LoraParts]:
    """The linear layers that the active adapter adapts, by their names in the base model.

    Raises:
        UserError: there is none.
    """
    model = unwrap(model)
    adapter = active_adapters(model)[0]
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            parts = LoraParts(module.lora_A[adapter], module.lora_B[adapter], module.scaling[adapter])
            found[name.removeprefix("base_model.model.")] = parts
    if not found:
        raise UserError("The model has no LoRA layer; load a run of scalabl train.")
    return found


@contextmanager
def weight_noise(model: nn.Module, noise: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which particle n has A + noise[n] in the place of A.

    Args:
        model: a PEFT model with a LoRA adapter.
        noise: (N, r, d_in) by the layer's name.
    """

    def hook_of(values: Tensor) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            number = _particles(x, values)
            flat = x.reshape(number, -1, x.shape[-1])
            return output + torch.bmm(flat, values.to(x).transpose(1, 2)).view(output.shape)

        return hook

    parts = lora_parts(model)
    with removed_after([parts[name].down.register_forward_hook(hook_of(values)) for name, values in noise.items()]):
        yield


@contextmanager
def input_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which particle n sees mask[n] * x in the place of A's input x.

    Args:
        model: a PEFT model with a LoRA adapter.
        masks: (N, d_in) factors by the layer's name.
    """

    def hook_of(values: Tensor) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0]
            number = _particles(x, values)
            masked = x.reshape(number, -1, x.shape[-1]) * values.to(x)[:, None]
            return (masked.view(x.shape), *inputs[1:])

        return hook

    parts = lora_parts(model)
    with removed_after([parts[name].down.register_forward_pre_hook(hook_of(v)) for name, v in masks.items()]):
        yield


@contextmanager
def removed_after(handles: list[RemovableHandle]) -> Iterator[None]:
    """Context behind which hooks are taken out again."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _particles(x: Tensor, values: Tensor) -> int:
    number = values.shape[0]
    if x.dim() < 3 or x.shape[0] % number:
        raise UserError(
            f"A batch of shape {tuple(x.shape)} cannot carry {number} particles: give (rows, tokens, d), with the "
            f"rows repeated {number} times."
        )
    return number
