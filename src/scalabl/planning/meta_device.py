"""Bytes alive and floating point operations of code that is run on the meta device: shapes without numbers.

Every operation that torch dispatches there, the backward pass's included, makes tensors without memory. Their storages
are followed from birth to death, so that the most that is alive at once is what an allocator would have to hand out. A
view shares its storage and costs nothing; what an operation uses inside itself is not seen.

Where a real device does something else than the meta device, the latter is made to do likewise:

attention: the meta device takes it apart into matrix products, whose probabilities (B, H, T, T) autograd would save.
The CPU's kernel saves its inputs, its output and the logarithm of a sum a row instead; so do CUDA's.
4 bit (bitsandbytes), nf4 with double quantisation [QLoRA, 2305.14314]: half a byte a number; a scale of 8 bit for each
block of 64 numbers; a scale of 32 bit for each 256 of those, with their mean; two code books a layer.
8 bit (bitsandbytes) [LLM.int8(), 2208.07339]: a byte a number, a scale of 32 bit a row. Its step keeps every layer's
input.
8 bit (torchao): a byte a number, a scale of 32 bit and a zero point of 8 bit a row. Its step keeps the unpacked weight
of every layer that a gradient goes through: the whole model in its own precision.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch._meta_registrations  # shapes of what torch implements for real devices alone, such as attention kernels
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from scalabl.tuner.layers import head_parts

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


_MASK_ALIGNMENT = 8  # CUDA's kernel wants a mask's rows to begin at multiples of so many numbers
# of torch's list for automatic mixed precision, what a transformer and its adapter call
_IN_LOW_PRECISION = (F.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm)


_autocast_enabled = torch.is_autocast_enabled


def _autocast_enabled_but_on_meta(*device: str) -> bool:
    return device != ("meta",) and _autocast_enabled(*device)


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
        self._asked, self._before = torch.is_autocast_enabled, torch.is_autocast_enabled(self.device)
        # older Transformers ask of the meta device, of which torch has no answer
        torch.is_autocast_enabled = _autocast_enabled_but_on_meta  # type: ignore[assignment]
        torch.set_autocast_enabled(
            self.device, self.autocast is not None
        )  # which PEFT asks for; no meta tensor heeds it
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_autocast_enabled(self.device, self._before)
        torch.is_autocast_enabled = self._asked

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


_BLOCK, _SCALES = 64, 256  # numbers a scale, and scales a scale of scales
_CODES = 16 + 256  # float32 numbers of the two code books


def quantize(model: PreTrainedModel, bits: int, library: str, device: str) -> None:
    """Put `QuantizedLinear` in the place of every linear layer that is quantised on loading: all but the output layer
    or a classification head, and what shares weights with the embeddings.

    Args:
        model: on the meta device.
        bits: 4 or 8.
        library: "bitsandbytes" or "torchao".
        device: "cpu" or "cuda", whose kernels are meant.
    """
    kept = [*get_keys_to_not_convert(model), *head_parts(model)]
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(name == key or name.startswith(f"{key}.") for key in kept):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, QuantizedLinear(module, bits, library, device))


class QuantizedLinear(nn.Linear):
    """What stands in for a quantised layer: its tensors' sizes, and an operation that takes what the real one takes."""

    def __init__(self, plain: nn.Linear, bits: int, library: str, device: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        number = plain.weight.numel()
        packed = (number + 1) // 2 if bits == 4 else number
        kind = torch.uint8 if bits == 4 else torch.int8
        self.weight = nn.Parameter(torch.empty(packed, dtype=kind, device="meta"), requires_grad=False)
        self.bias = plain.bias
        if bits == 4:
            blocks = math.ceil(number / _BLOCK)
            scales = {"absmax": (blocks, torch.uint8)}
            scales["constants"] = (math.ceil(blocks / _SCALES) + 1 + _CODES, torch.float32)
        else:
            scales = {"scale": (self.out_features, torch.float32)}
            if library == "torchao":
                scales["zero_point"] = (self.out_features, torch.int8)
        for name, (size, dtype) in scales.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"))
        self.keeps_weight = library == "torchao"
        self.keeps_input = bits == 8 and library == "bitsandbytes"
        # on a GPU LLM.int8() quantises the input and multiplies in 8 bit; everywhere else the weight is unpacked
        self.unpacks = not (self.keeps_input and device == "cuda")

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) -> (..., d_out)."""
        if self.keeps_weight:
            product = torch.mm(x.reshape(-1, self.in_features), x.new_empty(self.out_features, self.in_features).t())
            scaled = (product * x.new_empty(self.out_features)).view(*x.shape[:-1], self.out_features)
            return scaled if self.bias is None else scaled + self.bias
        made: Tensor = _Product.apply(x, self.bias, (self.out_features, self.in_features), self)  # type: ignore[no-untyped-call]
        return made


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], layer: QuantizedLinear) -> Tensor:
        ctx.shape = shape
        if layer.keeps_input and ctx.needs_input_grad[0]:
            ctx.x = x
        if layer.unpacks:
            return F.linear(x, x.new_empty(shape), bias)
        rounded = x.to(torch.float16).to(torch.int8)
        return F.linear(rounded, layer.weight.view(shape)).to(torch.int32).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ grad.new_empty(ctx.shape), None, None, None
