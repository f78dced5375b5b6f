"""Counts and bytes of the model on the meta device are those of the real one; of quantised ones too."""

from typing import Any

import pytest
import torch
from real_step import real_model, settings_of
from torch import Tensor, nn

from scalabl.planning.meta_device import QuantizedLinear
from scalabl.planning.meta_model import build
from scalabl.runs.method import load_method
from scalabl.runs.models import read_config
from scalabl.training.run import count_parameters


def parts_of(tensor: Tensor) -> list[Tensor]:
    """What a quantised parameter consists of."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]  # type: ignore[operator]
    found = [tensor]
    quantised = getattr(tensor, "quant_state", None)
    if quantised is not None:
        inner = quantised.state2
        found += [quantised.absmax, quantised.code, quantised.offset, inner.absmax, inner.code]
    scale = getattr(tensor, "SCB", None)
    return [*found, scale] if scale is not None else found


def bytes_of(tensors: list[Tensor]) -> int:
    storages = {part.untyped_storage()._cdata: part for tensor in tensors for part in parts_of(tensor)}
    return sum(part.untyped_storage().nbytes() for part in storages.values())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    "changes",
    [
        {"covariance": "full", "target_modules": "q_proj,down_proj"},
        {"method": "mle", "layers": "last:2"},
        {"method": "blob"},
        {"method": "ivon"},
        {"dtype": "bfloat16"},
        {"stochastic_layers": "last:1"},
    ],
)
def test_counts_are_the_real_models(architecture: str, changes: dict[str, Any]) -> None:
    settings = settings_of(architecture, **changes)
    _, counts = build(settings, read_config(settings.model), "cpu")
    real = real_model(settings)
    assert {"base": counts.base, "lora": counts.lora, "variational": counts.variational} == count_parameters(
        real, load_method(settings.method)
    )
    held = dict(real.named_parameters()) | dict(real.named_buffers())
    assert counts.weights == bytes_of([t for name, t in held.items() if "lora_" not in name])
    assert counts.adapter == bytes_of([t for name, t in held.items() if "lora_" in name])
    assert counts.gradients == sum(p.numel() * p.element_size() for p in real.parameters() if p.requires_grad)


@pytest.mark.parametrize(("bits", "library"), [(4, "bitsandbytes"), (8, "bitsandbytes"), (8, "torchao")])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_quantised_bytes_are_the_real_models(architecture: str, bits: int, library: str) -> None:
    pytest.importorskip(library)
    settings = settings_of(architecture, bits=bits, quantization=library, dtype="bfloat16")
    model, counts = build(settings, read_config(settings.model), "cpu")
    real = real_model(settings)
    held = dict(real.named_parameters()) | dict(real.named_buffers())
    assert counts.weights == bytes_of([t for name, t in held.items() if "lora_" not in name])
    assert counts.adapter == bytes_of([t for name, t in held.items() if "lora_" in name])
    assert {"base": counts.base, "lora": counts.lora, "variational": counts.variational} == count_parameters(
        real, load_method(settings.method)
    )
    planned = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    quantised = {
        name
        for name, module in real.named_modules()
        if isinstance(module, nn.Linear) and len(parts_of(module.weight)) > 1
    }
    assert planned == quantised and len(planned) == 3 * 7


def test_what_a_four_bit_weight_takes() -> None:
    layer = QuantizedLinear(nn.Linear(300, 500, bias=False, device="meta"), 4, "bitsandbytes", "cuda")
    sizes = [t.numel() * t.element_size() for t in (layer.weight, layer.absmax, layer.constants)]
    blocks = -(-150_000 // 64)
    assert sizes == [75_000, blocks, 4 * (-(-blocks // 256) + 1 + 16 + 256)]
    x = torch.empty(2, 3, 300, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
