"""A model's modules by any of their names: eval mode for a while, shards gathered, names stripped, the top layers.

The top layers are "last:K", a fraction of them "last:0.25", or "variance:0.9"; a layer is a depth at which something is
adapted: a decoder layer, or what follows them all (lm_head), the last. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from scalabl.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


# what torch.compile, FSDP and checkpointing wrappers put into the names of the modules inside them
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode; afterwards each of its modules in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def gathered(tensor: Tensor) -> Tensor:
    """A tensor, whole where it is sharded over processes (a DTensor); all of them have to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def base_name(name: str) -> str:
    """The name in the base model, without what PEFT and wrappers put in front or between."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.model.")


def split_leaf(name: str) -> tuple[str, str]:
    """(adapted layer, what is behind its `lora_A`) of a module's, parameter's or stored tensor's name; ("...", "") of
    one that is not at an A."""
    layer, _, rest = base_name(name).partition(".lora_A.")
    return layer, rest


def check_spec(spec: str, *, variance: bool = False) -> tuple[str, float]:
    """The two halves of a specification: ("last", K or a fraction) or ("variance", a share).

    Args:
        spec: as a user writes it.
        variance: whether "variance:SHARE" has a meaning here.

    Raises:
        UserError: it is none of these.
    """
    kind, _, number = spec.partition(":")
    whole = number.isdecimal() and len(number) < 10
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind == "last" and (value >= 1 if whole else 0 < value <= 1):
        return kind, int(number) if whole else value
    if variance and kind == "variance" and 0 < value <= 1:
        return kind, value
    further = ", or by their share of the predictive variance, variance:0.9" if variance else ""
    shown = repr(spec[:40])
    raise UserError(f"stochastic_layers is {shown}; it must be last:K, or a fraction of them, last:0.25{further}.")


def top_layers(depths: Mapping[str, int], spec: str) -> list[str]:
    """The names in the top layers.

    Args:
        depths: name -> how deep it lies.
        spec: "last:K", or a fraction, rounded up.

    Raises:
        UserError: there are no K layers.
    """
    levels = sorted(set(depths.values()))
    _, number = check_spec(spec)
    kept = number if isinstance(number, int) else math.ceil(number * len(levels))
    if kept > len(levels):
        raise UserError(f"stochastic_layers is {spec!r}, but s is uncertain in {len(levels)} layers at most; lower it.")
    chosen = set(levels[len(levels) - int(kept) :])
    return [name for name, depth in depths.items() if depth in chosen]


def holding_variance(depths: Mapping[str, int], variances: Mapping[str, float], share: float) -> str:
    """The "last:K" of the fewest top layers that hold a share of the variance.

    Args:
        depths: name -> how deep it lies.
        variances: name -> its part of the predictive variance, in any unit.
        share: in (0, 1].
    """
    levels = sorted(set(depths.values()), reverse=True)
    total = sum(variances.values())
    covered = 0.0
    for number, level in enumerate(levels, start=1):
        covered += sum(variances[name] for name, depth in depths.items() if depth == level)
        if covered >= share * total * (1 - 1e-9):
            return f"last:{number}"
    return f"last:{len(levels)}"
