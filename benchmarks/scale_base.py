"""Base models of a published shape with random weights, made where they stay, and what they and a step on them take."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from methods import RANK
from shapes import SHAPES
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from scalabl.runs.quantization import keep_differentiable, quantization_config

TARGETS = ("q_proj", "v_proj", "lm_head")  # of the ScalaBL paper's experiments
DTYPE = torch.bfloat16


def build(shape: str, bits: int, device: str, seed: int) -> PreTrainedModel:
    """The model on the device, of bfloat16 weights or (all but embedding and output layer) of 4-bit nf4 with double
    quantisation.

    Weights are drawn one module at a time at the place where they stay, and a 4-bit layer's are packed before the next
    layer's are drawn: the peak is the model itself and one matrix.

    Raises:
        UserError: 4 bit without bitsandbytes.
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(SHAPES[shape].config(), dtype=DTYPE)
    if bits == 4:
        from transformers.integrations import replace_with_bnb_linear

        replace_with_bnb_linear(model, ["lm_head"], quantization_config("bitsandbytes", 4, DTYPE))
        model.is_loaded_in_4bit = True  # PEFT asks for it
    for module in model.modules():
        if bits == 4 and type(module).__name__ == "Linear4bit":
            _draw_4bit(module, device, model.config.initializer_range)
        else:
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
    model.tie_weights()
    keep_differentiable(model)
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def _draw_4bit(module: Any, device: str, std: float) -> None:
    from bitsandbytes.nn import Params4bit

    drawn = torch.empty(module.out_features, module.in_features, dtype=DTYPE, device=device).normal_(std=std)
    old = module.weight
    packed: Any = Params4bit(
        drawn,
        requires_grad=False,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    )
    module.weight = packed.to(device)
    if module.bias is not None:
        module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=DTYPE, device=device), requires_grad=False)


def base_bytes(shape: str, bits: int) -> int:
    """Of the weights: 2 a number, or at 4 bit half a one and a byte of scale for 64, but for the two embeddings."""
    total, config = SHAPES[shape].parameters, SHAPES[shape].config()
    if bits == 16:
        return 2 * total
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return round(2 * embeddings + (total - embeddings) * (1 / 2 + 1 / 64))


def adapter_numbers(config: PretrainedConfig, method: str) -> int:
    """Trained numbers of an adapter on the targets; BLoB has a second one for each of A, ScalaBL 2 r a layer."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    value = hidden // config.num_attention_heads * config.num_key_value_heads
    inputs = (2 * layers + 1) * RANK * hidden
    outputs = RANK * (layers * (hidden + value) + config.vocab_size)
    more = {"blob": inputs, "scalabl": (2 * layers + 1) * 2 * RANK}
    return inputs + outputs + more.get(method, 0)


def training_bytes(shape: str, bits: int, tokens: int, methods: tuple[str, ...]) -> int:
    """An estimate, on the large side, of the peak of a step with gradient checkpointing, all adapters being there."""
    config = SHAPES[shape].config()
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    adapters = 16 * sum(adapter_numbers(config, method) for method in methods)  # float32: weight, gradient, AdamW's two
    kept = 2 * tokens * hidden * config.num_hidden_layers
    of_a_layer = 2 * tokens * (16 * hidden + 8 * inner)
    # logits in bfloat16; in float32 the adapter's, the sum, the copy for the loss, its softmax and its gradient
    logits = tokens * vocabulary * (2 + 5 * 4)
    packing = 8 * hidden * inner if bits == 4 else 0  # a matrix unpacked
    return base_bytes(shape, bits) + adapters + kept + of_a_layer + logits + packing


def free_bytes(device: str) -> int:
    """What a device has left, the caching allocator's unused blocks included."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Freed tensors back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
