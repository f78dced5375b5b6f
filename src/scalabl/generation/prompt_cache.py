"""Several texts for one prompt: the prompt is encoded once a particle, and its keys and values serve all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from scalabl.generation.fan_out import Draws, averaged

# what says that the cache is the caller's own affair
_OWN_CACHE = ("past_key_values", "use_cache", "cache_implementation", "generation_config")


def can_share(model: Any, inputs: dict[str, Tensor], texts: int, generation: dict[str, Any]) -> bool:
    """Whether there are several texts a prompt, a token to share, no wish for another cache, the model's own defaults
    included, and a cache of keys and values alone: the states of convolutions and linear attention cannot be repeated.
    """
    if texts == 1 or inputs["input_ids"].shape[1] == 1 or any(name in generation for name in _OWN_CACHE):
        return False
    defaults = model.generation_config
    if defaults.use_cache is False or defaults.cache_implementation not in (None, "dynamic", "hybrid"):
        return False  # "hybrid" is an old name of the default
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def shared_prompts(model: nn.Module, draws: Draws, inputs: dict[str, Tensor], texts: int) -> dict[str, Any]:
    """What `generate` is given for B prompts with several texts each: B times that many rows, and a cache of their
    prompts but for the last token.

    Rows of a layer are particle by particle, of each the prompts: repeating every row in its place gives, particle by
    particle, of each the prompts' texts.

    Args:
        model: a PEFT model with an adapter.
        draws: the particles.
        inputs: input_ids and attention_mask, (B, T), padded on the left.
        texts: texts a prompt.
    """
    mask = inputs["attention_mask"][:, :-1]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)  # as `generate` counts them
    with averaged(model, draws):
        cache = model(
            input_ids=inputs["input_ids"][:, :-1], attention_mask=mask, position_ids=positions, use_cache=True,
            logits_to_keep=1,
        ).past_key_values  # fmt: skip
    cache.batch_repeat_interleave(texts)
    repeated = {name: value.repeat_interleave(texts, dim=0) for name, value in inputs.items()}
    return {**repeated, "past_key_values": cache}
