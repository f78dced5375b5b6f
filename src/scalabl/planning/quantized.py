"""A linear layer of 8 or 4 bit on the meta device: the bytes of bitsandbytes and torchao, and what their steps save.

4 bit, nf4 with double quantisation [QLoRA, 2305.14314]: half a byte a number; a scale of 8 bit for each block of 64
numbers; a scale of 32 bit for each 256 of those, with their mean; two code books a layer.
8 bit [LLM.int8(), 2208.07339]: a byte a number, a scale of 32 bit a row. Its step keeps every layer's input.
8 bit (torchao): a byte a number, a scale of 32 bit and a zero point of 8 bit a row. Its step keeps the unpacked weight
of every layer that a gradient goes through: the whole model in its own precision.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

_BLOCK, _SCALES = 64, 256  # numbers a scale, and scales a scale of scales
_CODES = 16 + 256  # float32 numbers of the two code books


def quantize(model: PreTrainedModel, bits: int, library: str, device: str) -> None:
    """Put `QuantizedLinear` in the place of every linear layer that is quantised on loading: all but the output layer
    and what shares weights with the embeddings.

    Args:
        model: on the meta device.
        bits: 4 or 8.
        library: "bitsandbytes" or "torchao".
        device: "cpu" or "cuda", whose kernels are meant.
    """
    kept = get_keys_to_not_convert(model)
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
