"""The frozen trunk: what lies below the lowest adapted layer is the same for every particle, step and epoch.

It is run once for a row, stopping at the lowest adapted decoder layer; from then on that layer is fed the stored
hidden states and the layers below are passed through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from scalabl.errors import UserError

if TYPE_CHECKING:
    from scalabl.scoring.base import Batch


class _Reached(Exception):
    """The trunk's end: the forward pass goes no further."""


class _Inject(nn.Module):
    """Stands in for the first decoder layer: hands on the stored hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.hidden.to(hidden_states.dtype)


class _Pass(nn.Module):
    """Stands in for every other decoder layer of the trunk."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class Trunk:
    """The decoder layers below the lowest adapted one.

    Args:
        model: a model with an adapter.

    Attributes:
        depth: how many decoder layers the trunk has; 0 means that there is nothing to share.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = decoder_layers(model)
        self.depth = lowest_adapted_layer(model, self.layers)

    @torch.no_grad()
    def encode(self, model: nn.Module, batch: Batch) -> Tensor:
        """The hidden states (B, T, d) that enter layer `depth`."""
        from scalabl.scoring.scorer import token_logits

        reached: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        after = self.layers[self.depth] if self.depth < len(self.layers) else _final_norm(model)
        handle = after.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            token_logits(model, batch, None)
        except _Reached:
            pass
        finally:
            handle.remove()
        return reached[0]

    @contextmanager
    def resume(self, _model: nn.Module, hidden: Tensor) -> Iterator[None]:
        """Within it the model starts from `hidden` (B, T, d) at layer `depth`."""
        original = [self.layers[i] for i in range(self.depth)]
        try:
            for i in range(self.depth):
                self.layers[i] = _Inject(hidden) if i == 0 else _Pass()
            yield
        finally:
            for i, layer in enumerate(original):
                self.layers[i] = layer

    def check(self, model: nn.Module, batch: Batch, tolerance: float = 1e-3) -> None:
        """Refuse a model that does not give the same logits from its trunk.

        Raises:
            UserError: the logits differ by more than `tolerance` of their spread.
        """
        from dataclasses import replace

        from scalabl.scoring.scorer import token_logits

        with torch.no_grad():
            whole = token_logits(model, batch, None).float()
            resumed = token_logits(model, replace(batch, trunk=self.encode(model, batch)), self).float()
        gap = ((whole - resumed).abs().max() / whole.std()).item()
        if not gap <= tolerance * (1 if whole.dtype == torch.float32 else 50):
            raise UserError(f"This architecture cannot resume from a cached trunk (logits differ by {gap:.2g} std).")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's list of decoder layers: its longest ModuleList of like modules.

    Raises:
        UserError: there is none.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    if not lists:
        raise UserError("This model has no list of decoder layers, so it has no trunk to share.")
    return max(lists, key=lambda m: (len(m), sum(p.numel() for p in m.parameters())))


def lowest_adapted_layer(model: nn.Module, layers: nn.ModuleList) -> int:
    """The index of the lowest decoder layer with an adapter; their number if only what follows them is adapted."""
    prefix = next(name for name, module in model.named_modules() if module is layers)
    lowest = len(layers)
    outside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not name.startswith(prefix + ".")
    ]
    if any("embed" in name for name in outside):
        return 0
    for name, module in model.named_modules():
        match = re.match(re.escape(prefix) + r"\.(\d+)\.", name)
        if match and (isinstance(module, BaseTunerLayer) or any(p.requires_grad for p in module.parameters(False))):
            lowest = min(lowest, int(match[1]))
    return lowest


def _final_norm(model: nn.Module) -> nn.Module:
    named = [(name, m) for name, m in model.named_modules() if re.search(r"(^|\.)(norm|ln_f|final_layernorm)$", name)]
    if not named:
        raise UserError("This model has no final normalisation by a known name; adapt at least one decoder layer.")
    return named[-1][1]
