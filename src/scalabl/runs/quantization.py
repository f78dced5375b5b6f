"""Base models of 8 or 4 bit: which library holds the weights, and how. Imports nothing heavy.

bitsandbytes    8 bit LLM.int8() [Dettmers et al. 2022, 2208.07339], 4 bit nf4 with double quantisation [QLoRA,
                Dettmers et al. 2023, 2305.14314]
torchao         8 bit: int8 weights with a scale a row, multiplied in the model's own dtype

The adapter, its r numbers and the KL are float32 beside all of them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from scalabl.core.errors import UserError

QUANTIZATIONS = ("bitsandbytes", "torchao")


def check_bits(quantization: str, bits: int | None) -> None:
    """Refuse a combination that there is not; None for a base that is not quantised.

    Raises:
        UserError: the sentence says which there are.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"quantization is {quantization!r}; it must be one of {', '.join(QUANTIZATIONS)}.")
    if bits not in (None, 4, 8):
        raise UserError(f"bits is {bits}; it must be 4, 8 or left out.")
    if quantization == "torchao" and bits != 8:
        held = "bits is left out, so nothing would be quantised" if bits is None else "it holds 8 bit here"
        raise UserError(f"quantization is torchao, but {held}; set bits to 8, or quantization to bitsandbytes.")


def quantization_config(quantization: str, bits: int, dtype: Any) -> Any:
    """What `from_pretrained` is given as its `quantization_config`.

    Args:
        quantization: one of `QUANTIZATIONS`.
        bits: 8, or 4.
        dtype: the model's `torch.dtype`, which 4-bit weights are unpacked to and multiplied in.

    Raises:
        UserError: there is no such combination, or its library is not installed.
    """
    check_bits(quantization, bits)
    if importlib.util.find_spec(quantization) is None:
        raise UserError(
            f"A base of {bits} bit needs a package that is not installed: pip install {quantization} (or leave out "
            "--bits)."
        )
    if quantization == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_differentiable(model: Any) -> None:
    """Keep 4-bit layers from being packed for prediction by their first pass on a CPU with AVX-512 BF16.

    bitsandbytes never unpacks them for a later training pass, and a packed product has no gradient: what lies below
    would silently be trained on a part of it, and the linearised predictive would find none.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
