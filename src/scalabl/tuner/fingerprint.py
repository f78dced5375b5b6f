"""A short name for a base model, equal across precisions, so that an adapter is never put on another one."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str | None:
    """16 hex digits of the model's architecture and of its last normalisation weights, or None on a meta device.

    Normalisation weights are never quantised and differ between any two trained models; they are compared in
    bfloat16, so that the same model in float32, bfloat16 or 4 bit has one fingerprint.
    """
    norms = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if "norm" in name.lower() or "ln_" in name.lower()
    ]
    norms = [(name, parameter) for name, parameter in norms if "lora_" not in name]
    if not norms or any(parameter.is_meta for _, parameter in norms[-1:]):
        return None
    config = getattr(model, "config", None)
    digest = hashlib.sha256()
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        digest.update(f"{key}={getattr(config, key, None)};".encode())
    # the first and the last: a base that was tuned further differs in at least one of them
    for _, parameter in (norms[0], norms[-1]):
        value = parameter.detach()
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        digest.update(value.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
