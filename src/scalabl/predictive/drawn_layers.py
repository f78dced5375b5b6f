"""Which stochastic layers a predictive draws, and the lowest of them: below it all particles are one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from scalabl.core.errors import UserError
from scalabl.core.top_layers import top_layers
from scalabl.tuner.layers import depths, stochastic_layers
from scalabl.tuner.state import only


def drawn_layers(model: nn.Module, spec: str | None) -> dict[str, int]:
    """The stochastic layers that are drawn, with their depths; empty where the model has no posterior over s.

    Args:
        model: a PEFT model.
        spec: "last:K" or a fraction "last:0.25" of the stochastic layers; None for all.

    Raises:
        UserError: there are fewer such layers.
    """
    try:
        names = stochastic_layers(model)
    except UserError:
        return {}
    found = depths(model, names)
    return found if spec is None else {name: found[name] for name in top_layers(found, spec)}


def first_difference(model: nn.Module, spec: str | None) -> int | None:
    """The lowest decoder layer that is drawn; None for a rival, whose noise begins at the lowest adapted layer."""
    return min(drawn_layers(model, spec).values(), default=None)


def restricted(model: nn.Module, spec: str | None) -> AbstractContextManager[None]:
    """Context in which the stochastic layers that are not drawn carry their mean."""
    return nullcontext() if spec is None else only(model, drawn_layers(model, spec))
