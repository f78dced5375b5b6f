"""diag(s_mu) A as a tensor that is computed when its numbers are asked for.

PEFT's LoRA forward pass asks `lora_A.weight` for its dtype alone. Computing the mean for that takes a norm, a division,
an exponential and a product in every layer of every pass: kernels that count where launching them is what takes time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class MeanWeight(Tensor):
    """A tensor whose numbers are those of a function, called at their first use; differentiable as they are.

    dtype, shape and device are known without it. Any other function of torch is given the numbers, so that no result
    is a MeanWeight. What lies in its own memory is NaN: what comes past torch's functions (an assignment to `.data`,
    an extension in C++) shows at once.
    """

    _compute: Callable[[], Tensor]
    _dtype: torch.dtype
    _differentiable: bool
    _numbers: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of the numbers; asked for in every layer of every pass, so without torch's dispatch."""
        return self._dtype

    def numbers(self) -> Tensor:
        """The plain tensor; kept, because a pointer to its memory may have been given out (`data_ptr`)."""
        if self._numbers is None:
            with torch.set_grad_enabled(self._differentiable):
                self._numbers = self._compute()
        return self._numbers

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs or {})
        args, kwargs = tree_map_only(MeanWeight, MeanWeight.numbers, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def mean_weight(compute: Callable[[], Tensor], like: Tensor) -> Tensor:
    """The numbers of `compute()`, later, but in the present grad mode; of the shape, dtype and device of `like`."""
    made = _nan(like.shape, like.dtype, like.device).as_subclass(MeanWeight)
    made._compute, made._dtype, made._differentiable = compute, like.dtype, torch.is_grad_enabled()
    return made


@functools.cache
def _nan(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN everywhere, in the memory of one number."""
    with torch.inference_mode(False):
        return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


# getters of what is known without the numbers
_KNOWN = {getattr(Tensor, name).__get__ for name in ("shape", "device", "ndim", "is_cuda", "is_meta")}
_KNOWN |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size}
