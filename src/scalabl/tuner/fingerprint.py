"""A short name for a base model, equal across precisions, so that an adapter is never put on another one."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from scalabl.core.modules import gathered

# parts of the names of what adapters add; a trained copy of a normalisation layer (modules_to_save) is no base weight
_ADDED = ("lora_", "modules_to_save")
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def fingerprint(model: nn.Module) -> str | None:
    """Identity of the model's architecture and of its first and last normalisation weights; None on a meta device.

    Normalisation weights are never quantised and differ between almost any two trained models; they are compared in
    bfloat16, so that the same model in float32, bfloat16 or 4 bit has one fingerprint of 16 hex digits. A float32
    model has a second one, after a colon: its own after rounding to float16, should it be loaded in that precision.
    Two bases that differ in frozen layers alone (a merged LoRA of attention layers) cannot be told apart.
    """
    norms = [
        parameter
        for name, parameter in model.named_parameters()
        if ("norm" in name.lower() or "ln_" in name.lower()) and not any(part in name for part in _ADDED)
    ]
    if not norms or norms[0].is_meta or norms[-1].is_meta:
        return None
    config = getattr(model, "config", None)
    sizes = [f"{key}={getattr(config, key, None)};" for key in _SIZES]
    # the first and the last: a base that was tuned further differs in at least one of them
    values = [gathered(parameter.detach()).to("cpu") for parameter in (norms[0], norms[-1])]
    names = [_digest(sizes, values), _digest(sizes, [value.to(torch.float16) for value in values])]
    return ":".join(dict.fromkeys(names))


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints can be of one model, each in a precision of its own."""
    return not set(one.split(":")).isdisjoint(other.split(":"))


def _digest(sizes: list[str], values: list[Tensor]) -> str:
    digest = hashlib.sha256("".join(sizes).encode())
    for value in values:
        digest.update(value.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
