"""Bytes alive and floating point operations of code that is run on the meta device: shapes without numbers.

Every operation that torch dispatches there, the backward pass's included, makes tensors without memory. Their storages
are followed from birth to death, so that the most that is alive at once is what an allocator would have to hand out. A
view shares its storage and costs nothing; what an operation uses inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch._meta_registrations  # shapes of what torch implements for real devices alone, such as attention kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # the CPU's attention kernel, whose first three arguments (four in the backward pass) are the ones of the GPU's
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class Use:
    """What some code took.

    Attributes:
        peak: the most bytes alive at once, beyond what was alive before.
        kept: bytes alive at its end, beyond what was alive before.
        flops: floating point operations of matrix products and attention; a multiply-add is two.
    """

    peak: int
    kept: int
    flops: int


class LiveBytes(TorchDispatchMode):
    """Within it, bytes alive on the meta device and operations are counted.

    Args:
        known: tensors that are there already and cost nothing: parameters, buffers, inputs.

    Attributes:
        now, peak: bytes alive, and the most so far.
        flops: operations so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        # kept alive, so that their storages' addresses are not given to others
        self._known = [tensor.untyped_storage() for tensor in known]
        self._followed: dict[int, Any] = {storage._cdata: None for storage in self._known}

    def use(self) -> Use:
        """What was taken so far."""
        return Use(self.peak, self.now, self.flops)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._follow(tensor)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._followed:
            return

        def gone(_: Any) -> None:
            del self._followed[key]
            self.now -= size

        self._followed[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
