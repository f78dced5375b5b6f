"""Images in front of a question: their places in the prompt, their pixels in a batch, what the model is given.

A row with images is a prompt in which each image has a run of image tokens; the model puts what its image side sees
into their places. Read are the families whose prompts, positions and masks are known here: Qwen-VL (2, 2.5, 3), whose
tokens have a position for time, height and width, and Gemma 3, whose image tokens see each other in both directions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor

from scalabl.core.errors import UserError
from scalabl.core.remote_code import reading_model, trust_remote_code
from scalabl.data.example import open_image
from scalabl.tuner.layers import language_side
from scalabl.tuner.threads import base_model

QWEN, GEMMA = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), ("gemma3",)


@dataclass(frozen=True)
class ImageReader:
    """How a model's prompts hold images.

    Attributes:
        processor: the model's image processor.
        mark: stands for an image in a prompt's text, once an image.
        token: the word of one image token.
        token_id: its number.
        mark_is_framed: whether the mark stands between `before` and `after` already.
        before, after: what frames the tokens of an image.
        tokens: how many an image has; None where that depends on its size.
        both_ways: whether the tokens of an image see each other in both directions.
    """

    processor: Any
    mark: str
    token: str
    token_id: int
    mark_is_framed: bool
    before: str
    after: str
    tokens: int | None
    both_ways: bool

    def marks(self, number: int) -> str:
        """What stands for so many images in a prompt that no chat template makes."""
        return (f"{self.before}{self.mark}{self.after}" if self.mark_is_framed else self.mark) * number

    def expand(self, text: str, images: Sequence[str], row: str) -> str:
        """The prompt with as many image tokens in the place of each mark as its image has.

        Raises:
            UserError: an image cannot be read, or the text has other marks than those of its images.
        """
        parts = text.split(self.mark)
        if len(parts) != len(images) + 1:
            raise UserError(
                f"Row {row} has {len(images)} images, but {len(parts) - 1} marks {self.mark} in its prompt; take the "
                "marks out of its text, or give a chat template that knows images."
            )
        whole = parts[0]
        for count, part in zip(self.counts(images, row), parts[1:], strict=True):
            tokens = self.token * count
            whole += (tokens if self.mark_is_framed else f"{self.before}{tokens}{self.after}") + part
        return whole

    def counts(self, images: Sequence[str], row: str) -> list[int]:
        """How many tokens each image has."""
        pixels = self.pixels(images, row)
        if self.tokens is not None:
            return [self.tokens] * len(images)
        return [int(grid.prod()) // self.processor.merge_size**2 for grid in pixels["image_grid_thw"]]

    def pixels(self, images: Sequence[str], row: str) -> dict[str, Tensor]:
        """What the image side reads, images behind each other.

        Raises:
            UserError: an image cannot be read.
        """
        opened = [open_image(path, row) for path in images]
        try:
            made = self.processor(images=opened, return_tensors="pt")
        except ValueError as error:  # a strip of one pixel's height
            raise UserError(f"Row {row}: an image cannot be processed ({error}); give another one.") from error
        return {name: made[name] for name in ("pixel_values", "image_grid_thw") if name in made}


def _reader(path: str, config: Any, tokenizer: Any) -> ImageReader:
    what, mend = f"The image processor of {path} cannot be loaded", "; save it there with processor.save_pretrained."
    with reading_model(what, mend):
        # without torchvision this is the slower one of Pillow, which is enough
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=trust_remote_code())

    def word(number: int) -> str:
        return str(tokenizer.convert_ids_to_tokens(number))

    token = word(config.image_token_id)
    if config.model_type in QWEN:
        before, after = word(config.vision_start_token_id), word(config.vision_end_token_id)
        return ImageReader(processor, token, token, config.image_token_id, True, before, after, None, False)
    mark = word(config.boi_token_index)
    before, after = f"\n\n{mark}", f"{word(config.eoi_token_index)}\n\n"
    tokens = config.mm_tokens_per_image
    return ImageReader(processor, mark, token, config.image_token_id, False, before, after, tokens, True)


def image_reader(tokenizer: Any) -> ImageReader:
    """How the model of a tokenizer, loaded from the same place, reads images.

    Raises:
        UserError: it has no image side, one that is not known here, or no image processor.
    """
    path = str(tokenizer.name_or_path)
    with reading_model(f"The model {path} cannot be loaded"):
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code())
    if config.model_type not in (*QWEN, *GEMMA):
        raise UserError(
            f"The rows have images, but {path} ({config.model_type}) reads text alone, or images in a way that is not "
            f"known here; give a model of {', '.join((*QWEN, *GEMMA))}, or take the images out of the rows."
        )
    return _reader(path, config, tokenizer)


@dataclass(frozen=True)
class RowImages:
    """The images of an encoded row.

    Attributes:
        paths: of the images.
        row: the row's name, for messages.
        reader: of the model.
    """

    paths: tuple[str, ...]
    row: str
    reader: ImageReader


@dataclass(frozen=True)
class BatchImages:
    """The images of a batch; copies of a row (its particles) share their pixels.

    Attributes:
        of: (B, T), 0 for text and k for the k-th image of the row.
        picture: (B,), the row's place among the pixels.
        pixels: the image side's inputs, images behind each other, and how many each place has, "counts".
        both_ways: whether the tokens of an image see each other in both directions.
    """

    of: Tensor
    picture: Tensor
    pixels: dict[str, Tensor]
    both_ways: bool

    def map(self, f: Callable[[Tensor], Tensor]) -> BatchImages:
        """With what belongs to rows changed, and the pixels as they are."""
        return replace(self, of=f(self.of), picture=f(self.picture))

    def with_pixels_on(self, device: torch.device | str) -> BatchImages:
        """With the pixels on another device."""
        return replace(self, pixels={name: tensor.to(device) for name, tensor in self.pixels.items()})


def batch_images(rows: Sequence[RowImages | None], input_ids: Tensor) -> BatchImages | None:
    """The images of a batch's rows (B) of tokens (B, T); None where no row has any."""
    present = [row for row in rows if row is not None]
    if not present:
        return None
    reader = present[0].reader
    is_image = input_ids == reader.token_id
    begins = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    parts = [row.reader.pixels(row.paths, row.row) for row in present]
    pixels = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    pixels["counts"] = torch.tensor([0 if row is None else len(row.paths) for row in rows])
    return BatchImages(begins.cumsum(dim=1) * is_image, torch.arange(len(rows)), pixels, reader.both_ways)


class ImageRows(Protocol):
    """What is read of a batch (`scalabl.scoring.base.Batch`)."""

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    images: BatchImages | None


def image_inputs(model: nn.Module, batch: ImageRows) -> dict[str, Any]:
    """Keywords of the model's forward pass: pixels or what was seen in them, positions; none where no row has images.

    Particles are copies of rows: the image side, which is not adapted, sees an image once for all of them.
    """
    if batch.images is None:
        return {}
    pixels = batch.images.pixels
    base: Any = base_model(model)
    counts = pixels["counts"].tolist()
    starts = [sum(counts[:place]) for place in range(len(counts))]
    images = [starts[place] + i for place in batch.images.picture.tolist() for i in range(counts[place])]
    if not images:
        return {}
    distinct = sorted(set(images))
    found = _positions(base.model, batch, batch.images, images)
    shares = "mm_encoder_outputs" in inspect.signature(base.forward).parameters
    if len(distinct) == len(images) or not shares or _image_side_is_adapted(base):
        return found | _of_images(pixels, images)
    with torch.no_grad():
        seen = base.model.get_image_features(**_of_images(pixels, distinct), return_dict=True)
    places = [distinct.index(image) for image in images]
    return found | {"mm_encoder_outputs": {"image": _repeated(seen, places)}}


def _positions(core: Any, batch: ImageRows, found: BatchImages, images: list[int]) -> dict[str, Tensor]:
    """Positions (3, B, T) in time, height and width, where the model has such: the model's own for the prompt, and for
    the choices behind it as for text, each choice beginning where the prompt ends."""
    if not hasattr(core, "get_rope_index"):
        return {}
    # older Transformers find images by their token
    prompt, told = batch.segments == 0, "mm_token_type_ids" in inspect.signature(core.get_rope_index).parameters
    positions, _ = core.get_rope_index(
        batch.input_ids,
        **({"mm_token_type_ids": (found.of > 0).int()} if told else {}),
        image_grid_thw=found.pixels["image_grid_thw"][images],
        attention_mask=prompt.long(),
    )
    # the model's own number of this counts the row's other tokens in older Transformers
    behind = positions.amax(dim=0).where(prompt, 0).amax(dim=1, keepdim=True) + 1 - prompt.sum(dim=1, keepdim=True)
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


def _repeated(seen: Any, places: list[int]) -> Any:
    """What the image side saw, image by image, in the order of the images of all copies, in its own type."""
    embedded = seen.pooler_output
    if isinstance(embedded, Tensor):
        return type(seen)(pooler_output=embedded[places])
    made: dict[str, Any] = {"pooler_output": tuple(embedded[i] for i in places)}
    deeper = getattr(seen, "deepstack_features", None)  # what enters behind each of the lowest layers, image by image
    if deeper is not None:
        made["deepstack_features"] = [tuple(layer[i] for i in places) for layer in deeper]
    return type(seen)(**made)


def _image_side_is_adapted(base: nn.Module) -> bool:
    language = set(language_side(base).modules())
    output: Any = base.get_output_embeddings()  # type: ignore[operator]
    language |= set(output.modules())
    return any(isinstance(module, BaseTunerLayer) and module not in language for module in base.modules())
