"""Classification heads on encoders and decoders: padding, trunk, particles, saving, the merged mean in a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_base import perturb, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
    pipeline,
)

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.methods.plain import lora_options
from scalabl.predictive import LinearizedPredictive, MeanPredictive, MonteCarloPredictive, predict
from scalabl.runs.models import load_base
from scalabl.runs.settings import Settings
from scalabl.scoring import Scorer
from scalabl.scoring.head import Head
from scalabl.scoring.trunk import Trunk
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.tuner import ScalaBLConfig
from scalabl.tuner.mean_adapter import MEAN_DIRECTORY

LABELS = ("red", "blue", "green")
_SIZES: dict[str, Any] = {
    "vocab_size": 310, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 130, "pad_token_id": 0,
}  # fmt: skip
_DECODER: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**_SIZES),
    "distilbert": DistilBertConfig(
        vocab_size=310, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=130, pad_token_id=0
    ),
    "roberta": RobertaConfig(**_SIZES),
    "deberta-v2": DebertaV2Config(
        **_SIZES, relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=32
    ),
    "electra": ElectraConfig(**_SIZES, embedding_size=16),
    "mpnet": MPNetConfig(**_SIZES),
    "modernbert": ModernBertConfig(**_SIZES, global_attn_every_n_layers=2, local_attention=8),
    "llama": LlamaConfig(**_DECODER),
    "qwen2": Qwen2Config(**_DECODER),
    "gemma3": Gemma3TextConfig(
        **_DECODER, head_dim=8, layer_types=["full_attention", "sliding_attention", "full_attention"]
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the body of a model, without a head, and its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(MODELS[request.param]).base_model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # what a token says reaches the logits
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def scorer_of(base: Path, adapter: Path | None = None, layers: str = "last:2") -> Scorer:
    """The model with its head and adapter, new ones that are as if trained, or saved ones."""
    model, tokenizer = load_base(str(base), labels=LABELS)
    adapted: PeftModel
    if adapter is None:
        torch.manual_seed(1)
        adapted = get_peft_model(model, ScalaBLConfig(**lora_options(Settings.flat(layers=layers, r=4), model)))
        perturb(adapted)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "modules_to_save" in name and "pooler" not in name and parameter.dim() > 1:
                    parameter.mul_(20)
    else:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    return Scorer(adapted.eval(), Head(tokenizer, labels=LABELS, max_length=100), Trunk(adapted))


def rows() -> list[Example]:
    texts = ("red", "a green answer that is long enough to be padded by others for sure", "blue or not?", "yes and no")
    return [Example(str(i), text, LABELS, i % 3) for i, text in enumerate(texts)]


def test_padding_trunk_and_particles_change_nothing(base: Path) -> None:
    scorer = scorer_of(base)
    assert scorer.trunk is not None and scorer.trunk.depth == 1
    encoded = [scorer.scoring.encode(row) for row in rows()]
    alone = predict(Scorer(scorer.model, scorer.scoring), encoded, MeanPredictive(), batch_size=1)
    assert alone.std(dim=1).max() > 0.01  # rows differ
    together = predict(scorer, encoded, MeanPredictive(), batch_size=4)
    stored = predict(scorer, with_stored_trunk(scorer, encoded, batch_size=3), MeanPredictive(), batch_size=4)
    assert (together - alone).abs().max() < 1e-4 and (stored - alone).abs().max() < 1e-4

    particles = predict(scorer, encoded, MonteCarloPredictive(6, seed=3), batch_size=4)
    by_one = predict(scorer, encoded, MonteCarloPredictive(6, seed=3), batch_size=1)
    assert (particles - by_one).abs().max() < 1e-4
    assert particles.std(dim=0).max() > 1e-3  # and particles do
    linearised = predict(scorer, encoded, LinearizedPredictive(), batch_size=4)
    assert linearised.shape[1:] == particles.shape[1:] and linearised.isfinite().all()


def test_it_is_saved_with_its_head_and_the_merged_mean_is_a_pipeline_of_its_labels(base: Path, tmp_path: Path) -> None:
    scorer = scorer_of(base)
    encoded = [scorer.scoring.encode(row) for row in rows()]
    expected = predict(scorer, encoded, MeanPredictive())[0]
    scorer.model.save_pretrained(tmp_path / "run")
    torch.manual_seed(99)  # the head of the base is drawn anew, and must not count
    found = predict(scorer_of(base, tmp_path / "run"), encoded, MeanPredictive())[0]
    assert (found - expected).abs().max() < 1e-5

    plain, tokenizer = load_base(str(base), labels=LABELS)
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "run" / MEAN_DIRECTORY)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    classify = pipeline("text-classification", str(tmp_path / "merged"), top_k=None)
    for row, log_probs in zip(rows(), expected, strict=True):
        scores = {each["label"]: each["score"] for each in classify([row.question])[0]}
        assert [scores[label] for label in LABELS] == pytest.approx(log_probs.exp().tolist(), abs=1e-4)


def test_a_row_of_other_choices_is_refused() -> None:
    head = Head(tiny_tokenizer(), labels=LABELS)
    with pytest.raises(UserError, match="has choices of its own"):
        head.encode(Example("q", "text", ("red", "blue"), 0))
    with pytest.raises(UserError, match="at least two labels"):
        Head(tiny_tokenizer(), labels=["red"])
