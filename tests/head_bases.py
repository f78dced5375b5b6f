"""Tiny bodies for classification heads, with their tokenizer, and adapters with a head as stock PEFT makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_base import tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
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
)

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


def body_of(name: str, directory: Path) -> Path:
    """A directory with the body of a model, without a head, and its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(MODELS[name]).base_model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # what a token says reaches the logits
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


# what is trained whole: what has no weights in the body
HEADS: dict[str, list[str]] = {"distilbert": ["pre_classifier", "classifier"], "deberta-v2": ["pooler", "classifier"]}


def stock_head(directory: Path, body: Path, config: LoraConfig | None = None, **options: Any) -> PeftModel:
    """An adapter with a head of `LABELS` as PEFT makes it, as if trained, saved in the directory."""
    plain = classifier_on(body)
    if config is None:
        whole = HEADS.get(plain.config.model_type)
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "modules_to_save": whole}
        config = LoraConfig(task_type="SEQ_CLS", **settings | options)
    torch.manual_seed(3)
    model = get_peft_model(plain, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif ".classifier." in name or ".score." in name:
                parameter.mul_(20)
    model.save_pretrained(str(directory))
    return model.eval()


def classifier_on(body: Path, labels: int = len(LABELS)) -> Any:
    """The body under a head of Transformers' own, drawn anew; its labels have no names."""
    tokenizer = AutoTokenizer.from_pretrained(body)
    return AutoModelForSequenceClassification.from_pretrained(
        body, num_labels=labels, pad_token_id=tokenizer.pad_token_id
    )


@torch.no_grad()
def own_logits(model: Any, texts: list[str]) -> Tensor:
    """(n, C) the logits that a model gives texts by itself, one by one."""
    tokenizer = tiny_tokenizer()
    return torch.cat([model(**tokenizer(t, return_tensors="pt", return_token_type_ids=False)).logits for t in texts])


def own_probs(model: Any, texts: list[str]) -> Tensor:
    """(n, C) what a model says of texts by itself, one by one."""
    return own_logits(model, texts).softmax(dim=-1)
