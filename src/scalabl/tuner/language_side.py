"""The language side of an image-text model: what is adapted by default, and whose layers are counted."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from scalabl.tuner.layers import bare, unwrap


def reads_images(model: nn.Module) -> bool:
    """Whether a model has an image side beside its language side."""
    return getattr(getattr(unwrap(model), "config", None), "vision_config", None) is not None


def language_side(model: nn.Module) -> nn.Module:
    """The decoder of an image-text model; any other model as it is."""
    if not reads_images(model):
        return model
    base: Any = unwrap(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    side: nn.Module = base.get_decoder()
    return side


def beside_language(model: nn.Module) -> str | None:
    """A regular expression of the modules that are neither the language side nor the output layer; None for a model
    without an image side.

    PEFT's `exclude_modules`: a target named by the end of its path (q_proj) is in many image towers too.
    """
    if not reads_images(model):
        return None
    base: Any = unwrap(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    kept = [bare(name) for name, module in base.named_modules() if module is base.get_decoder()]
    kept += [bare(name) for name, module in base.named_modules() if module is base.get_output_embeddings()]
    names = "|".join(re.escape(name) for name in kept)
    return rf"(?!(?:{names})(?:\.|$)).*"
