"""The formats that a base model's weights are held in, and the same weights in float32 to compare with."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from tiny_base import perturb, tiny_tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import scalabl
from scalabl.runs.models import load_base
from scalabl.tuner import stochastic_layers


@dataclass(frozen=True)
class Format:
    """How a recipe holds the base.

    Attributes:
        settings: keywords of `load_base` and settings of a run.
        rounding: of the format's arithmetic beside float32 arithmetic on the same weights, relative: bfloat16 rounds
            activations to 8 bits, as bitsandbytes' 8-bit products do, and its 4-bit products on CPUs with AVX-512 BF16.
    """

    name: str
    settings: dict[str, Any] = field(hash=False)
    rounding: float

    @property
    def held(self) -> dict[str, Any]:
        """`settings`; a test that asks for them is left out where their library is not installed."""
        if "bits" in self.settings:
            pytest.importorskip(self.settings.get("quantization", "bitsandbytes"))
        return self.settings


FORMATS = (
    Format("float32", {"dtype": "float32"}, 1e-5),
    Format("bfloat16", {"dtype": "bfloat16"}, 3e-2),
    Format("bitsandbytes-8bit", {"dtype": "float32", "bits": 8}, 3e-2),
    Format("bitsandbytes-4bit", {"dtype": "float32", "bits": 4}, 3e-2),
    Format("bitsandbytes-4bit-bfloat16", {"dtype": "bfloat16", "bits": 4}, 3e-2),
    Format("torchao-8bit", {"dtype": "float32", "bits": 8, "quantization": "torchao"}, 1e-5),
    Format("torchao-8bit-bfloat16", {"dtype": "bfloat16", "bits": 8, "quantization": "torchao"}, 3e-2),
)


@functools.cache
def saved_base() -> Path:
    """A tiny Llama and its tokenizer; sizes are multiples of 64, the block of 4-bit weights."""
    config = LlamaConfig(
        vocab_size=310, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(3)  # logits of order one
    directory = tempfile.TemporaryDirectory(prefix="scalabl-tiny-")
    _KEPT.append(directory)
    model.save_pretrained(directory.name)
    tiny_tokenizer().save_pretrained(directory.name)
    return Path(directory.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def base_in(form: Format) -> PreTrainedModel:
    """The tiny model, held in a format."""
    return load_base(str(saved_base()), **form.held)[0]


@torch.no_grad()
def dequantised(base: PreTrainedModel) -> PreTrainedModel:
    """A float32 model with the numbers that a base's weights stand for."""
    twin = LlamaForCausalLM.from_pretrained(saved_base(), dtype=torch.float32).eval()
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.copy_(_numbers(base.get_submodule(name)))
        elif hasattr(module, "weight"):  # normalisations
            module.weight.copy_(base.get_submodule(name).weight.float())
    return twin


def _numbers(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    if type(weight) is nn.Parameter:
        return weight.float()
    if type(weight).__module__.startswith("torchao"):
        return weight.dequantize().float()
    return dequantize_module_weight(module).float()


def adapted(base: nn.Module, **config: Any) -> PeftModel:
    """The base with an adapter as if trained: the same one on every base."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(base, scalabl.ScalaBLConfig(**settings))
    perturb(model)
    # A and the posterior are drawn in the base's own precision: give every base those of the first
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for leaf in stochastic_layers(model).values():
            leaf.direction.copy_(torch.randn(leaf.direction.shape, generator=generator))
            leaf.posterior.log_mean.copy_(0.3 * torch.randn(leaf.out_features, generator=generator))
            leaf.posterior.log_std.copy_(-1 + 0.3 * torch.randn(leaf.out_features, generator=generator))
            for name, parameter in leaf.posterior.named_parameters():
                if name == "lower":
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(rows: int, length: int = 8, seed: int = 3) -> Tensor:
    """(rows, length) token numbers."""
    return torch.randint(3, 310, (rows, length), generator=torch.Generator().manual_seed(seed))
