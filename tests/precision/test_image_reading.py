"""What Qwen-VL and Gemma 3 are given for rows with images, held against their own processors, masks and positions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_text import adapted, gemma_processor, image_text_base, parts, rows
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor

import scalabl
from scalabl.predictive import LinearizedPredictive, MonteCarloPredictive, predict
from scalabl.runs.models import load_base
from scalabl.scoring import Continuation, Encoded, Letters, Scorer, Scoring
from scalabl.scoring.prefix import shared_prefix
from scalabl.scoring.scorer import gap_to_own_reading
from scalabl.tuner import stochastic_layers


def test_an_image_prompt_is_the_one_of_the_models_own_processor(architecture: str, images: Path) -> None:
    tokenizer, image_processor = parts(architecture)
    if architecture == "gemma3":
        processor: Any = gemma_processor()
    else:
        # Qwen-VL's processor wants a video processor, which needs torchvision; its text and images do not
        kind = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[architecture]
        processor = kind.__new__(kind)
        processor.image_processor, processor.tokenizer, processor.chat_template = image_processor, tokenizer, None
        processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
        processor.image_token_id, processor.video_token_id = tokenizer.convert_tokens_to_ids(
            ["<|image_pad|>", "<|video_pad|>"]
        )
    loaded = load_base(str(image_text_base(architecture)))[1]
    for chat in (False, True):
        scoring = Letters(loaded, num_letters=4, chat=chat)
        for row in rows(images)[:3]:
            encoded = scoring.encode(row)
            found = scoring.images_of(row)
            assert found is not None
            reader = found.reader
            if chat:
                content = [*[{"type": "image"}] * len(row.images), {"type": "text", "text": scoring.prompt(row)}]
                text = loaded.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
                )
            else:
                text = f"{reader.marks(len(row.images))}\n{scoring.prompt(row)}"
            opened = [Image.open(path).convert("RGB") for path in row.images]
            expected = processor(images=opened, text=[text], return_tensors="pt", add_special_tokens=not chat)
            assert encoded.input_ids == expected["input_ids"][0].tolist()
            pixels = reader.pixels(row.images, row.id)
            for name in pixels:
                assert torch.equal(pixels[name], expected[name]), name


def test_logits_behind_images_are_the_models_own(architecture: str, images: Path) -> None:
    model, tokenizer = adapted(architecture)
    for scoring in (Letters(tokenizer, num_letters=4), Letters(tokenizer, num_letters=4, chat=True)):
        for row in rows(images)[:3]:
            batch = scoring.collate([scoring.encode(row)])
            assert gap_to_own_reading(model, batch) < 1e-4


@pytest.mark.parametrize("kind", ["letters", "continuation"])
def test_batches_and_packed_choices_change_no_score(architecture: str, kind: str, images: Path) -> None:
    """Rows of one image and of two, of several sizes, padded into one batch; choices in one row as one by one."""
    model, tokenizer = adapted(architecture)
    scoring: Scoring = Letters(tokenizer, num_letters=4) if kind == "letters" else Continuation(tokenizer)
    # choices of several tokens, whose own positions matter
    words = ("ninety-nine bees", "a long answer", "wide open stone")
    encoded = [scoring.encode(replace(row, choices=words, answer=0)) for row in rows(images)[:5]]
    assert len({len(row.input_ids) for row in encoded}) >= 2
    scorer = Scorer(model, scoring)
    for row in encoded:
        scorer.check_packing(row)
    with torch.no_grad():
        together = scorer.class_log_probs(scoring.collate(encoded)).exp()
        for i, row in enumerate(encoded):
            alone = scorer.class_log_probs(scoring.collate([row])).exp()
            assert (together[i, : alone.shape[1]] - alone[0]).abs().max() < 1e-5
    if kind == "letters":
        return
    # one choice at a time, each behind its own copy of the prompt, in the model's own way
    row = encoded[2]
    assert row.images is not None and len(row.images.paths) == 2
    assert all(row.segments.count(number) > 3 for number in (1, 2, 3))
    own = [_own_log_likelihood(model, scoring, row, number) for number in range(1, row.num_choices + 1)]
    with torch.no_grad():
        scores = scorer.class_logits(scoring.collate([row]))[0]
    assert torch.allclose(scores, torch.stack(own), atol=1e-4)


@torch.no_grad()
def _own_log_likelihood(model: PeftModel, scoring: Scoring, row: Encoded, number: int) -> Tensor:
    """Mean log-likelihood of a choice's tokens, from the model's own masks and positions."""
    ids = [t for t, segment in zip(row.input_ids, row.segments, strict=True) if segment in (0, number)]
    prompt = row.segments.count(0)
    batch = scoring.collate([row])
    assert batch.images is not None
    kinds = torch.zeros(1, len(ids), dtype=torch.int)
    kinds[0, :prompt] = (batch.images.of[0, :prompt] > 0).int()
    own = {"token_type_ids": kinds} if batch.images.both_ways else {"mm_token_type_ids": kinds}
    pixels = {name: value for name, value in batch.images.pixels.items() if name != "counts"}
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **own, **pixels).logits
    log_probs = logits[0].log_softmax(dim=-1)
    return log_probs[prompt - 1 : -1].gather(1, tokens[0, prompt:, None]).mean()


def test_particles_share_what_the_image_side_saw(architecture: str, images: Path) -> None:
    model, tokenizer = adapted(architecture)
    scoring = Letters(tokenizer, num_letters=4)
    batch = scoring.collate([scoring.encode(row) for row in rows(images)[:4]])
    scorer = Scorer(model, scoring)
    seen: list[int] = []
    core: Any = model.get_base_model().model
    tower: nn.Module = core.vision_tower if architecture == "gemma3" else core.visual
    tower.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), scalabl.particles(model, 3, seed=2):
        whole = scorer.class_log_probs(batch.repeat(3)).view(3, 4, -1)
    assert len(seen) == 1, "one pass of the image side"
    for particle in range(3):
        with torch.no_grad(), scalabl.particles(model, 1, seed=2, first=particle):
            alone = scorer.class_log_probs(batch)
        present = alone.isfinite()
        assert (whole[particle] - alone)[present].abs().max() < 1e-4
    assert whole[..., 0].std(dim=0).min() > 1e-3, "particles differ"
    # some rows alone, as adaptive N takes them
    chosen = torch.tensor([3, 1])
    with torch.no_grad(), scalabl.particles(model, 3, seed=2):
        part = scorer.class_log_probs(batch.select(chosen).repeat(3)).view(3, 2, -1)
    assert shared_prefix(scorer, [scoring.encode(row) for row in rows(images)[:4]]) is None
    assert scorer.shares_prefix is None, "not even tried: images differ where tokens do not"
    present = part.isfinite()
    assert (part - whole[:, chosen])[present].abs().max() < 1e-4


def test_the_linearised_predictive_reads_images(architecture: str, images: Path) -> None:
    model, tokenizer = adapted(architecture)
    for leaf in stochastic_layers(model).values():  # small noise, where it is exact
        leaf.posterior.log_std.data.sub_(4)
    scorer = Scorer(model, Letters(tokenizer, num_letters=4))
    encoded = [scorer.scoring.encode(row) for row in rows(images)[:4]]
    linear = predict(scorer, encoded, LinearizedPredictive(1024))
    drawn = predict(scorer, encoded, MonteCarloPredictive(400))
    present = torch.tensor([[i < row.num_choices for i in range(linear.shape[-1])] for row in encoded])
    spread = drawn.exp().std(dim=0)[present]
    assert (spread > 0).all()
    assert (linear.exp().std(dim=0)[present] / spread - 1).abs().max() < 0.2
