"""A deep model measured at a small depth: layers that are alike take alike.

What a step takes grows by the same bytes and operations with each further layer of a kind. So two layers of each kind
are kept, the others are passed through, and one more of each kind tells what the rest of them add.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

_KEPT = 2


class _Pass(nn.Module):
    """Stands in for a layer that is left out."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _OtherForm(Exception):
    """Layers of this model do not take and give plain hidden states, so that none can be passed through."""


def over_depth(
    layers: nn.ModuleList, kinds: Sequence[Hashable], measure: Callable[[], Sequence[int]]
) -> tuple[int, ...]:
    """What `measure` would give with all layers.

    Args:
        layers: the decoder layers.
        kinds: of each layer; layers of a kind are alike.
        measure: runs the model and returns numbers that are linear in how many layers of each kind there are.
    """
    of_kind: dict[Hashable, list[int]] = defaultdict(list)
    for index, kind in enumerate(kinds):
        of_kind[kind].append(index)
    fewest = {kind: min(len(indices), _KEPT) for kind, indices in of_kind.items()}
    more = [kind for kind, indices in of_kind.items() if len(indices) > _KEPT]

    def at(numbers: dict[Hashable, int]) -> Sequence[int]:
        kept = {index for kind, number in numbers.items() for index in of_kind[kind][-number:]}
        with _shortened(layers, kept):
            return measure()

    with suppress(_OtherForm):
        base = at(fewest)
        total = list(base)
        for kind in more:
            longer = at(fewest | {kind: _KEPT + 1})
            rest = len(of_kind[kind]) - _KEPT
            total = [sum_ + rest * (b - a) for sum_, a, b in zip(total, base, longer, strict=True)]
        return tuple(total)
    return tuple(measure())


def layer_kinds(layers: nn.ModuleList, types: Sequence[str] | None, marks: Sequence[int]) -> list[Hashable]:
    """What distinguishes each layer: its modules, the shapes of their parameters, its type of attention, and where it
    lies.

    Args:
        layers: the decoder layers.
        types: of their attention (full, sliding), where the configuration names them.
        marks: numbers of layers that are of a kind of their own, and part those below from those above.
    """
    kinds: list[Hashable] = []
    for index, layer in enumerate(layers):
        modules = tuple((name, type(module).__name__) for name, module in layer.named_modules())
        shapes = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        place = tuple((index > mark) - (index < mark) for mark in marks)
        kinds.append((modules, shapes, types[index] if types else None, place))
    return kinds


@contextmanager
def _shortened(layers: nn.ModuleList, kept: set[int]) -> Iterator[None]:
    original = list(layers)
    left_out = len(kept) < len(original)
    handles = []
    try:
        for index, layer in enumerate(original):
            if index not in kept:
                layers[index] = _Pass()
            elif left_out:
                handles.append(layer.register_forward_hook(_plain))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for index, layer in enumerate(original):
            layers[index] = layer


def _plain(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not isinstance(output, Tensor) or (args and args[0].shape != output.shape):
        raise _OtherForm
