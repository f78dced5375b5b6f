"""How deep a module lies: the number of its decoder layer."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from scalabl.errors import UserError
from scalabl.tuner.language_side import language_side
from scalabl.tuner.layers import bare, unwrap


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's list of decoder layers: its (language side's) longest ModuleList of like modules.

    Raises:
        UserError: there is none.
    """
    lists = [
        m for m in language_side(model).modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1
    ]
    if not lists:
        raise UserError("This model has no list of decoder layers, so nothing can be told about their depth.")
    most = max(map(len, lists))
    longest = [m for m in lists if len(m) == most]
    return longest[0] if len(longest) == 1 else max(longest, key=lambda m: sum(p.numel() for p in m.parameters()))


def depths(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Name of a module -> the number of its decoder layer; their count for what follows them (lm_head), 0 for an
    embedding, which comes before.

    Args:
        model: a model, with an adapter or without.
        names: of modules, in the base model or in the one with the adapter.
    """
    model = unwrap(model)
    layers = decoder_layers(model)
    prefix = bare(next(name for name, module in model.named_modules() if module is layers))
    found = {}
    for name in names:
        inside = re.match(re.escape(prefix) + r"\.(\d+)(\.|$)", bare(name))
        found[name] = int(inside[1]) if inside else 0 if "embed" in name else len(layers)
    return found
