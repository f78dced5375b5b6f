"""A classification head is float32 and never quantised, whatever holds the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from formats import FORMATS, Format, saved_base
from safetensors.torch import load_file
from tiny_base import tiny_tokenizer, write_texts
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from scalabl.core.files import ADAPTER
from scalabl.data.load import rows_of
from scalabl.inference.predictor import log_probabilities
from scalabl.planning.meta_model import build
from scalabl.runs.loading import load_run
from scalabl.runs.models import read_config
from scalabl.runs.settings import Settings
from scalabl.training.run import train
from scalabl.tuner.layers import head_parts, sequence_classifier

HELD = [form for form in FORMATS if form.name in ("bfloat16", "bitsandbytes-4bit-bfloat16", "torchao-8bit-bfloat16")]


def encoder(directory: Path) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=310, num_attention_heads=4, pad_token_id=0, **sizes)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("form", HELD, ids=lambda form: form.name)
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_head_is_float32_and_whole(form: Format, kind: str, tmp_path: Path) -> None:
    body = saved_base() if kind == "decoder" else encoder(tmp_path / "body")
    texts = write_texts(tmp_path / "texts")
    settings = Settings.flat(
        model=str(body), data=str(texts), scoring="head", steps=3, r=4, batch_size=8, layers="last:1", **form.held
    )
    train(settings, tmp_path / "run")
    saved = {name: t for name, t in load_file(tmp_path / "run" / ADAPTER).items() if "lora_" not in name}
    assert saved and all(tensor.dtype == torch.float32 for tensor in saved.values())
    run = load_run(tmp_path / "run")
    base: Any = sequence_classifier(run.scorer.model)
    assert base.config.dtype == torch.bfloat16
    quantised = {"Params4bit", "Int8Tensor", "Int8Params"}
    held = {type(p).__name__ for p in base.base_model.parameters()} & quantised
    assert bool(held) == ("bits" in form.held)
    assert set(head_parts(base)) == ({"score"} if kind == "decoder" else {"bert.pooler", "classifier"})
    for part in head_parts(base).values():
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not {type(p).__name__ for p in part.parameters()} & quantised
    # the logits are float32 products of what the body gives
    last: Any = base.score if kind == "decoder" else base.classifier
    weights = last.modules_to_save["default"]
    seen: list[Tensor] = []
    handle = weights.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    batch = run.scorer.scoring.collate(run.encode(rows_of(str(texts), limit=1)))
    logits = base(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids)).logits
    handle.remove()
    assert logits.dtype == torch.float32
    given = seen[0][:, -1] if seen[0].dim() == 3 else seen[0]
    assert isinstance(weights, nn.Linear)
    torch.testing.assert_close(logits, nn.functional.linear(given.float(), weights.weight, weights.bias))
    assert (logits.bfloat16().float() != logits).any()
    assert log_probabilities(run, rows_of(str(texts), limit=3), run.predictive("mc", samples=2)).isfinite().all()
    # a plan knows of it
    planned, _ = build(settings, read_config(str(body)), "cpu", labels=3)
    for part in head_parts(planned).values():
        assert {p.dtype for p in part.parameters()} == {torch.float32}
