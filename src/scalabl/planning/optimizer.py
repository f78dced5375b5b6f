"""Bytes of an optimiser's states."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

_SMALLEST, _BLOCK = 4096, 256  # numbers: smaller tensors keep states of 32 bit; a state of 8 bit has a scale a block

# numbers that are kept for each parameter, by how the optimiser's name in TrainingArguments begins; else Adam's two
_STATES = {"sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "ademamix": 3}


def optimizer_bytes(name: str, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the states of all trained parameters, wherever they are paged to.

    An optimiser that is not known here is taken for AdamW, whose two states a number are the most that is common.

    Args:
        name: as `TrainingArguments.optim` has it.
        parameters: those of the model; the ones that are not trained count for nothing.
    """
    states = next((n for start, n in _STATES.items() if name.removeprefix("paged_").startswith(start)), 2)
    return sum(_of_one(name, states, p) for p in parameters if p.requires_grad)


def _of_one(name: str, states: int, parameter: nn.Parameter) -> int:
    number = parameter.numel()
    if name == "adafactor":  # rows and columns of a matrix, all numbers of a vector
        if parameter.dim() < 2:
            return 4 * number
        rows, columns = parameter.shape[-2:]
        return 4 * (rows + columns) * (number // (rows * columns))
    if "8bit" in name and number >= _SMALLEST:
        return states * (number + 4 * math.ceil(number / _BLOCK))
    own = name.removeprefix("paged_").startswith(("adamw_torch", "sgd", "adagrad")) or name == "rmsprop"
    return states * number * (parameter.element_size() if own and "bit" not in name else 4)
