"""What a real device would do where the meta device does something else: attention kernels, automatic mixed precision.

On the meta device torch takes attention apart into matrix products, whose probabilities (B, H, T, T) autograd would
save. The CPU's kernel saves its inputs, its output and the logarithm of a sum a row instead; so do CUDA's.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MASK_ALIGNMENT = 8  # CUDA's kernel wants a mask's rows to begin at multiples of so many numbers
# of torch's list for automatic mixed precision, what a transformer and its adapter call
_IN_LOW_PRECISION = (F.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm)


class DeviceKernels(TorchFunctionMode):
    """Within it, the meta device attends as a device of some type does, and casts as its automatic mixed precision.

    Args:
        device: "cpu" or "cuda".
        autocast: the precision of automatic mixed precision; None where it is off.

    `loss.backward()` leaves the mode: what gradient checkpointing computes anew has to enter one of its own.
    """

    def __init__(self, device: str, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.device = device
        self.autocast = autocast

    def __enter__(self) -> Self:
        self._before = torch.is_autocast_enabled(self.device)
        torch.set_autocast_enabled(
            self.device, self.autocast is not None
        )  # which PEFT asks for; no meta tensor heeds it
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_autocast_enabled(self.device, self._before)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(self.device, *args, **kwargs)
        if func is Tensor.__bool__ and args[0].is_meta:
            return True  # a model asks whether a row is one sequence, and whether nothing is padded
        if self.autocast is not None and func in _IN_LOW_PRECISION:
            args = tuple(_cast(value, self.autocast) for value in args)
            kwargs = {name: _cast(value, self.autocast) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _attention(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """(B, H, T, d) what the fused kernel that a device takes gives, with what it saves."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    aten = torch.ops.aten
    out: Tensor
    if device == "cpu":
        out = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    elif attn_mask is None and query.dtype != torch.float32:
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    else:
        if enable_gqa:  # the kernels before know groups of heads
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if attn_mask is not None:
            length = attn_mask.shape[-1]
            if length % _MASK_ALIGNMENT:
                attn_mask = F.pad(attn_mask, (0, -length % _MASK_ALIGNMENT))[..., :length]
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], length)
        needs_gradient = torch.is_grad_enabled() and query.requires_grad
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
        )[0]
    return out
