"""The tuner's test matrix: architectures x formats of the base weights.

A new case joins by a row in ARCHITECTURES or FORMATS; every test of `test_matrix.py` then runs on it.
"""

import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    TorchAoConfig,
)
from transformers.utils.logging import disable_progress_bar

import scalabl
from scalabl.tuner import stochastic_layers

disable_progress_bar()

VOCABULARY = 96
# sizes are multiples of 64, the block of 4-bit quantisation
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Architecture:
    """A row: a tiny configuration and what to adapt in it (two kinds of layers, of different shapes)."""

    name: str
    config: Callable[[], PretrainedConfig]
    targets: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Format:
    """A column: how the base weights are held. `tolerance` is the rounding of its arithmetic, relative."""

    name: str
    options: Callable[[], dict[str, Any]]
    tolerance: float
    dtype: torch.dtype = torch.float32
    quantised: bool = field(default=False)


def _torchao_int8() -> dict[str, Any]:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    return {"dtype": torch.float32, "quantization_config": config}


def _bnb(**options: Any) -> dict[str, Any]:
    pytest.importorskip("bitsandbytes")
    return {"dtype": torch.float32, "quantization_config": BitsAndBytesConfig(**options), "device_map": {"": "cpu"}}


ARCHITECTURES = [
    Architecture("llama", lambda: LlamaConfig(**_SIZES, **_TOKENS)),
    Architecture("qwen2", lambda: Qwen2Config(**_SIZES, **_TOKENS)),
    Architecture("qwen3", lambda: Qwen3Config(**_SIZES, **_TOKENS, head_dim=16)),
    Architecture("gemma3", lambda: Gemma3TextConfig(**_SIZES, **_TOKENS, head_dim=16)),
    Architecture(
        "gpt2",  # Conv1D: weights are transposed
        lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0,
            attn_pdrop=0, **_TOKENS,
        ),
        targets=("c_attn", "c_proj"),
    ),
]  # fmt: skip

FORMATS = [
    Format("float32", lambda: {"dtype": torch.float32}, 1e-5),
    Format("bfloat16", lambda: {"dtype": torch.bfloat16}, 2e-2, torch.bfloat16),
    Format("bnb-8bit", lambda: _bnb(load_in_8bit=True), 2e-2, quantised=True),
    Format(
        "bnb-4bit",
        lambda: _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        2e-2,
        quantised=True,
    ),
    Format("torchao-int8", _torchao_int8, 1e-5, quantised=True),
]

CASES = [(architecture, form) for architecture in ARCHITECTURES for form in FORMATS]
CASE_IDS = [f"{architecture.name}-{form.name}" for architecture, form in CASES]


@functools.cache
def saved_base(name: str, seed: int = 0, **changes: Any) -> Path:
    """A directory with the tiny random model, its normalisation weights random too, as a trained model's are."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    config = architecture.config()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" not in parameter_name and "wte" not in parameter_name:
                parameter.mul_(4)  # logits of order one, so that a relative tolerance means something
    # the directory lives as long as the process
    directory = tempfile.TemporaryDirectory(prefix="scalabl-test-")
    _KEPT.append(directory)
    model.save_pretrained(directory.name)
    return Path(directory.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def load_base(name: str = "llama", form: Format = FORMATS[0], seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The tiny model with its weights held in `form`, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(saved_base(name, seed, **changes), **form.options()).eval()


def adapt(
    base: nn.Module, architecture: Architecture | None = None, *, trained: bool = True, **config: Any
) -> PeftModel:
    """The base with a ScalaBL adapter; `trained` moves B, A and the posterior away from their initial values."""
    targets = (architecture or ARCHITECTURES[0]).targets
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(targets), **config}
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT sets it right itself
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")
        model = get_peft_model(base, scalabl.ScalaBLConfig(**settings))
    if trained:
        perturb(model)
    return model


def perturb(model: nn.Module, adapter: str = "default", seed: int = 5) -> None:
    """Give every parameter of an adapter a random value, as training would; sigma is a fifth to a half."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." not in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_B" in name:
                parameter.copy_(0.3 * noise)
            elif "log_std" in name:
                parameter.copy_(-1.2 + 0.3 * noise)
            elif "log_mean" in name or "lower" in name or "direction" in name:
                parameter.add_((0.2 * noise).to(parameter.dtype))


def tokens(rows: int, length: int = 6, seed: int = 3) -> Tensor:
    """(rows, length) token numbers."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **arguments: Any) -> Tensor:
    """(rows, length, vocabulary) in float32."""
    out: Tensor = model(input_ids=ids, **arguments).logits
    return out.float()


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors agree to `tolerance` times their own size (the largest absolute value)."""
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())


def replace_by_plain_lora(model: nn.Module, s: dict[str, Tensor]) -> None:
    """Put an nn.Linear with the weight diag(s) A in the place of every stochastic leaf."""
    for name, leaf in stochastic_layers(model).items():
        linear = nn.Linear(leaf.in_features, leaf.out_features, bias=False)
        linear.weight.data = (s[name][:, None] * leaf.rows()).detach()
        model.get_submodule(f"base_model.model.{name}").lora_A["default"] = linear
