"""Tiny random models of architectures whose layers do more than attend, or count positions by columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tiny_base import perturb, tiny_tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import scalabl

_TOKENS: dict[str, Any] = {"vocab_size": 310, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    **_TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _of(name: str, **options: Any) -> PretrainedConfig:
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"Transformers {transformers.__version__} has no {name}")
    config: PretrainedConfig = getattr(transformers, f"{name}Config")(**options)
    return config


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3-next": lambda: _of(
        "Qwen3Next", **SIZES, **_LINEAR, **_EXPERTS, head_dim=8, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": lambda: _of("Lfm2", **SIZES, layer_types=["conv", "full_attention"]),
    "bamba": lambda: _of("Bamba", **SIZES, **_MAMBA, attn_layer_indices=[1]),
    "granite-moe-hybrid": lambda: _of(
        "GraniteMoeHybrid", **SIZES, **_MAMBA, layer_types=["mamba", "attention"], shared_intermediate_size=16,
        num_local_experts=4, num_experts_per_tok=2,
    ),
    "mamba2": lambda: _of(
        "Mamba2", **_TOKENS, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1,
        expand=2, chunk_size=16,
    ),
    "jamba": lambda: _of(
        "Jamba", **SIZES, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=2, num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "minimax": lambda: _of(
        "MiniMax", **SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1, block_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "mpt": lambda: _of("Mpt", **_TOKENS, d_model=32, n_heads=4, n_layers=2, max_seq_len=512, expansion_ratio=2),
    "gpt-neo": lambda: _of(
        "GPTNeo", **_TOKENS, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=8, max_position_embeddings=512,
    ),
    "llama4": lambda: _of(
        "Llama4Text", **SIZES, head_dim=8, attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=48,
        interleave_moe_layer_step=2, no_rope_layers=[1, 0], layer_types=["chunked_attention", "full_attention"],
    ),
    "bloom": lambda: _of("Bloom", **_TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "falcon-alibi": lambda: _of(
        "Falcon", **_TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "mamba": lambda: _of("Mamba", **_TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8),
    "gemma3n": lambda: _of(
        "Gemma3nText", **{**SIZES, "num_hidden_layers": 4, "intermediate_size": [48] * 4}, head_dim=8,
        vocab_size_per_layer_input=310, hidden_size_per_layer_input=8, altup_num_inputs=2, laurel_rank=4,
        num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16,
    ),
    "olmo-hybrid": lambda: _of("OlmoHybrid", **SIZES, **_LINEAR, layer_types=["linear_attention", "full_attention"]),
}  # fmt: skip
PACKED = ("llama4", "gemma3n")  # attention alone, under masks that are known here
TOKENIZER = tiny_tokenizer()


def model_of(name: str) -> PreTrainedModel:
    config = CONFIGS[name]()
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" not in parameter_name:
                parameter.mul_(4)
    return model


def adapted(name: str, targets: list[str], **options: Any) -> PeftModel:
    config = scalabl.ScalaBLConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(model_of(name), config)
    perturb(model)
    return model.eval()
