"""How many particles fit into memory at once."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from scalabl.scoring import Batch

# a fraction of what is free: other programs, fragmentation and the estimate's own error need the rest
_SHARE = 0.4
_CPU_LIMIT = 2 * 2**30


def bytes_per_particle(model: nn.Module, batch: Batch) -> int:
    """An upper estimate of the memory that one more particle of this batch takes in a forward pass without gradient."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows, length = batch.input_ids.shape
    width = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", 4 * hidden) or 4 * hidden
    # residual, normalised, q/k/v/out, and the MLP's three inner tensors; the mask; logits in float32 beside their own
    activations = rows * length * (6 * hidden + 3 * inner) * width
    before = 0 if batch.prefix is None else batch.prefix.length
    mask = rows * length * (before + length) * width
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    # the particle's own keys and values of the prefix in every layer, and their copies for the rows in one
    prefix = before * 2 * heads * head_size * width * (config.num_hidden_layers + rows)
    logits = rows * batch.keep * config.vocab_size * (width + 4)
    return activations + mask + prefix + logits


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _CPU_LIMIT)
    except (ValueError, OSError):
        return _CPU_LIMIT


def particles_at_once(model: nn.Module, batch: Batch, wanted: int) -> int:
    """How many of `wanted` particles of this batch to run together, at least 1."""
    budget = _SHARE * free_bytes(batch.input_ids.device)
    return max(1, min(wanted, int(budget // bytes_per_particle(model, batch))))
