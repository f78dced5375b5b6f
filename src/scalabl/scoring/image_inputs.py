"""What a model is given beside tokens and masks where rows have images: pixels or what was seen in them, positions."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from scalabl.scoring.base import Batch
from scalabl.tuner.layers import language_side, unwrap


def image_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Keywords of the model's forward pass; none where no row has images.

    Particles are copies of rows: the image side, which is not adapted, sees an image once for all of them.
    """
    if batch.pixels is None:
        return {}
    assert batch.picture is not None
    base: Any = unwrap(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    counts = batch.pixels["counts"].tolist()
    starts = [sum(counts[:place]) for place in range(len(counts))]
    images = [starts[place] + i for place in batch.picture.tolist() for i in range(counts[place])]
    if not images:
        return {}
    distinct = sorted(set(images))
    found = _positions(base.model, batch, images)
    shares = "mm_encoder_outputs" in inspect.signature(base.forward).parameters
    if len(distinct) == len(images) or not shares or _image_side_is_adapted(base):
        return found | _of_images(batch.pixels, images)
    with torch.no_grad():
        seen = base.model.get_image_features(**_of_images(batch.pixels, distinct), return_dict=True)
    places = [distinct.index(image) for image in images]
    return found | {"mm_encoder_outputs": {"image": _repeated(seen, places)}}


def _positions(core: Any, batch: Batch, images: list[int]) -> dict[str, Tensor]:
    """Positions (3, B, T) in time, height and width, where the model has such: the model's own for the prompt, and for
    the choices behind it as for text, each choice beginning where the prompt ends."""
    if not hasattr(core, "get_rope_index"):
        return {}
    assert batch.pixels is not None and batch.image_of is not None
    positions, behind = core.get_rope_index(
        batch.input_ids,
        mm_token_type_ids=(batch.image_of > 0).int(),
        image_grid_thw=batch.pixels["image_grid_thw"][images],
        attention_mask=(batch.segments == 0).long(),
    )
    of_choices = (batch.position_ids + behind)[None]
    return {"position_ids": torch.where((batch.segments > 0)[None], of_choices, positions)}


def _of_images(pixels: dict[str, Tensor], images: list[int]) -> dict[str, Tensor]:
    """The image side's inputs of some of the images, in this order."""
    values = pixels["pixel_values"]
    if "image_grid_thw" not in pixels:
        return {"pixel_values": values[images]}
    grids = pixels["image_grid_thw"]
    patches = values.split(grids.prod(dim=-1).tolist())
    return {"pixel_values": torch.cat([patches[i] for i in images]), "image_grid_thw": grids[images]}


def _repeated(seen: Any, places: list[int]) -> SimpleNamespace:
    """What the image side saw, image by image, in the order of the images of all copies."""
    embedded = seen.pooler_output
    if isinstance(embedded, Tensor):
        return SimpleNamespace(pooler_output=embedded[places])
    made = SimpleNamespace(pooler_output=tuple(embedded[i] for i in places))
    deeper = getattr(seen, "deepstack_features", None)  # what enters behind each of the lowest layers, image by image
    if deeper is not None:
        made.deepstack_features = [tuple(layer[i] for i in places) for layer in deeper]
    return made


def _image_side_is_adapted(base: nn.Module) -> bool:
    language = set(language_side(base).modules())
    output: Any = base.get_output_embeddings()  # type: ignore[operator]
    language |= set(output.modules())
    return any(isinstance(module, BaseTunerLayer) and module not in language for module in base.modules())
