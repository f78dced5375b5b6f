"""Tiny random image-text models as directories, and rows of generated images for them."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from tiny_base import perturb, tiny_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3Processor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

import scalabl
from scalabl.data import Example, load_task
from scalabl.runs.models import load_base

try:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
except ImportError:  # older Transformers: those without torchvision have the plain names
    from transformers import Gemma3ImageProcessor as Gemma3ImageProcessorPil
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}
# as the models' own tokenizers have them, behind the tiny tokenizer's words
QWEN_WORDS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
GEMMA_WORDS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
SIDE = 32  # pixels of an image

_CHAT = (
    "{% for m in messages %}<user>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}</user>{% endfor %}<reply>"
)


def _tokenizer(words: tuple[str, ...], mark: str, **named: str) -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(words)})
    if named:  # attributes of these names, as Gemma's tokenizer has
        made = PreTrainedTokenizerFast(
            tokenizer_object=made.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
            extra_special_tokens=named,
        )  # fmt: skip
    made.chat_template = _CHAT.replace("MARK", mark)
    return made


def _text(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, **more,
    }  # fmt: skip


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer(QWEN_WORDS, "<|vision_start|><|image_pad|><|vision_end|>")


def _gemma_tokenizer() -> PreTrainedTokenizerFast:
    named = dict(zip(("boi_token", "eoi_token", "image_token"), GEMMA_WORDS, strict=True))
    return _tokenizer(GEMMA_WORDS, GEMMA_WORDS[0], **named)


def _qwen2_5() -> PretrainedConfig:
    ids = _qwen_tokenizer().convert_tokens_to_ids(list(QWEN_WORDS))
    return Qwen2_5_VLConfig(
        text_config=_text(len(_qwen_tokenizer()), rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]}),
        # more layers than the language side, and names that it has too
        vision_config={
            "depth": 4, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
            "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1, 3], "spatial_merge_size": 2,
        },
        vision_start_token_id=ids[0], vision_end_token_id=ids[1], image_token_id=ids[2], video_token_id=ids[3],
    )  # fmt: skip


def _qwen3() -> PretrainedConfig:
    ids = _qwen_tokenizer().convert_tokens_to_ids(list(QWEN_WORDS))
    return Qwen3VLConfig(
        text_config=_text(
            len(_qwen_tokenizer()), head_dim=8, rope_scaling={"rope_type": "default", "mrope_section": [2, 1, 1]}
        ),
        vision_config={
            "depth": 4, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
            "out_hidden_size": 32, "spatial_merge_size": 2, "deepstack_visual_indexes": [0, 2],
            "num_position_embeddings": 64,
        },
        vision_start_token_id=ids[0], vision_end_token_id=ids[1], image_token_id=ids[2], video_token_id=ids[3],
    )  # fmt: skip


def _gemma3() -> PretrainedConfig:
    ids = _gemma_tokenizer().convert_tokens_to_ids(list(GEMMA_WORDS))
    layers = ["full_attention", "sliding_attention", "full_attention"]
    return Gemma3Config(
        text_config=_text(len(_gemma_tokenizer()), head_dim=8, sliding_window=24, layer_types=layers),
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
            "image_size": SIDE, "patch_size": 4,
        },
        mm_tokens_per_image=16, boi_token_index=ids[0], eoi_token_index=ids[1], image_token_index=ids[2],
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "gemma3": _gemma3,
}


@functools.cache
def image_text_base(architecture: str, seed: int = 0) -> Path:
    """A directory with a tiny random model, its tokenizer and its image processor."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(ARCHITECTURES[architecture](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):
                parameter.normal_()  # Gemma's starts at zero, where no image matters
            elif parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4)  # logits of order one
    directory = tempfile.TemporaryDirectory(prefix="scalabl-tiny-")
    _KEPT.append(directory)
    model.save_pretrained(directory.name)
    tokenizer, processor = parts(architecture)
    tokenizer.save_pretrained(directory.name)
    processor.save_pretrained(directory.name)
    return Path(directory.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def parts(architecture: str) -> tuple[PreTrainedTokenizerFast, Any]:
    """Tokenizer and image processor."""
    if architecture == "gemma3":
        return _gemma_tokenizer(), Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return _qwen_tokenizer(), Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)


def gemma_processor() -> Gemma3Processor:
    """The library's own processor of Gemma 3; Qwen-VL's cannot be made without torchvision."""
    tokenizer, image_processor = parts("gemma3")
    return Gemma3Processor(image_processor, tokenizer, image_seq_length=16)


def draw(path: Path, colour: str, *, seed: int = 0, width: int = SIDE, height: int = SIDE) -> Path:
    """A PNG of one colour with some noise."""
    noise = np.random.default_rng(seed).integers(-25, 25, (height, width, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_image_task(directory: Path, *, train: int = 18, validation: int = 6, test: int = 9) -> Path:
    """Questions whose answer is the colour of their image; a third of them has a second one, of another size."""
    for first, (split, number) in enumerate((("train", train), ("validation", validation), ("test", test))):
        rows = []
        for i in range(number):
            colour = list(COLOURS)[i % 3]
            name = f"images/{split}{i}.png"
            draw(directory / name, colour, seed=100 * first + i, width=SIDE if i % 2 else 2 * SIDE)
            image: str | list[str] = name
            if i % 3 == 2:
                image = [name, f"images/{split}{i}b.png"]
                draw(directory / image[1], colour, seed=1000 + 100 * first + i)
            choices = list(COLOURS) if i % 4 else [*COLOURS, "stone"]
            asked = {"question": "which colour is it?", "choices": choices, "answer": colour}
            rows.append({"id": f"{split}{i}", "image": image} | asked)
        path = directory / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return directory


def rows(images: Path, split: str = "test") -> list[Example]:
    """The rows of a split of an image task."""
    return list(load_task(str(images)).split(split))


def adapted(architecture: str, **config: Any) -> tuple[PeftModel, Any]:
    """The tiny model with an adapter as if trained, and its tokenizer."""
    base, tokenizer = load_base(str(image_text_base(architecture)))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(1)
    model = get_peft_model(base, scalabl.ScalaBLConfig(**settings))
    perturb(model)
    return model.eval(), tokenizer
