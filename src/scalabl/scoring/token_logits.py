"""The logits of a causal language model at the positions that a scoring reads."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from scalabl.scoring.base import Batch, attention_masks
from scalabl.scoring.image_inputs import image_inputs
from scalabl.tuner.layers import unwrap

if TYPE_CHECKING:
    from scalabl.trunk import Trunk


def token_logits(
    model: torch.nn.Module,
    batch: Batch,
    trunk: Trunk | None,
    positions: tuple[Tensor, Tensor] | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Logits at some positions, from the trunk's hidden states where the batch carries them.

    Args:
        model: a causal language model.
        batch: the rows.
        trunk: the lower layers, or None.
        positions: rows (M,) and columns (M,), among the last `batch.keep`; all of these if None.
        cache: keys and values of the prefix that the rows stand behind; or one to be filled with the rows' own.

    Returns:
        (M, V), or (B, keep, V) without positions.
    """
    inner = unwrap(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    output_layer = inner.get_output_embeddings()  # type: ignore[operator]
    at = None
    if positions is not None:
        at = (positions[0], positions[1] - (batch.input_ids.shape[1] - batch.keep))
    # an adapted output layer has to see which row a token belongs to
    early = type(output_layer) is torch.nn.Linear
    gather = nullcontext() if at is None or not early else output_layer.register_forward_pre_hook(_Gather(at))
    resume = nullcontext() if trunk is None or batch.trunk is None else trunk.resume(model, batch.trunk, batch.start)
    with resume, gather:
        logits: Tensor = model(
            input_ids=batch.input_ids,
            attention_mask=attention_masks(batch, dtype, _text_config(inner)),
            logits_to_keep=batch.keep,
            past_key_values=cache,
            use_cache=cache is not None,
            **{"position_ids": batch.position_ids, **image_inputs(inner, batch)},
        ).logits
    if at is None:
        return logits
    return logits[0] if early else logits[at]


class _Gather:
    """Hook in front of the output layer: hidden states (B, keep, d) -> (1, M, d)."""

    def __init__(self, at: tuple[Tensor, Tensor]) -> None:
        self.at = at

    def __call__(self, _module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][self.at][None],)


def _text_config(model: torch.nn.Module) -> Any:
    """The configuration of the language model, inside a multimodal one too."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
