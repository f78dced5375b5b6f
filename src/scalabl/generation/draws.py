"""Draws that are no posterior's: the mean alone, and the members of an ensemble as rows of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.predictive.lora_particles import removed_after
from scalabl.tuner.layers import stochastic_layers, unwrap
from scalabl.tuner.state import mean


class MeanDraws:
    """One particle: the posterior mean, or a plain LoRA as it is."""

    samples = 1

    def context(self, model: nn.Module, first: int, number: int) -> AbstractContextManager[None]:
        try:
            stochastic_layers(model)
        except UserError:
            return nullcontext()
        return mean(model)


class EnsembleDraws:
    """M adapters of one base model, member m on the rows m B .. (m + 1) B - 1 [Lakshminarayanan et al. 2017].

    Args:
        adapters: names of the members' plain LoRA adapters in the model.

    Raises:
        UserError: there is no member.
    """

    def __init__(self, adapters: Sequence[str]) -> None:
        if not adapters:
            raise UserError("An ensemble needs members; give the directories of runs of other seeds.")
        self.adapters, self.samples = list(adapters), len(adapters)

    @contextmanager
    def context(self, model: nn.Module, first: int, number: int) -> Iterator[None]:
        """Every adapted layer adds scaling B_m A_m x to the rows of member m."""
        chosen = self.adapters[first : first + number]
        handles = []
        for module in unwrap(model).modules():
            if isinstance(module, LoraLayer) and any(name in module.lora_A for name in chosen):
                handles.append(module.register_forward_hook(_members(chosen)))
        with removed_after(handles), model.disable_adapter():  # type: ignore[operator]
            yield


def _members(adapters: list[str]) -> Any:
    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].unflatten(0, (len(adapters), -1))
        added = []
        for rows, name in zip(x, adapters, strict=True):
            if name in layer.lora_A:
                a, b = layer.lora_A[name], layer.lora_B[name]
                added.append(b(a(rows.to(a.weight.dtype))) * layer.scaling[name])
            else:
                added.append(rows.new_zeros(*rows.shape[:-1], output.shape[-1]))
        return output + torch.cat(added).to(output.dtype)

    return hook
