"""Tiny random base models with a tokenizer, as directories, and rows for them: what several rooms' tests share."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

import scalabl
from scalabl.data import Example
from scalabl.runs.models import load_base
from scalabl.tuner import stochastic_layers

CHAT_TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}<reply>"

_CORPUS = [
    "Question: which word is red or blue?\nAnswer: red", "Question: a b c d e\nAnswer: green", "text\nLabel: yes",
    "no maybe A B C D E F", " A B C D E F yes no red blue green A B C D E F yes no red blue green",
]  # fmt: skip


def tiny_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens that puts <s> in front; " A" to " F", " yes" and " no" are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def _sizes(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": 310,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


ARCHITECTURES: dict[str, Callable[[int], PretrainedConfig]] = {
    "llama": lambda layers: LlamaConfig(**_sizes(layers)),
    "qwen2": lambda layers: Qwen2Config(**_sizes(layers)),
    "qwen3": lambda layers: Qwen3Config(**_sizes(layers), head_dim=8),
    "gemma3": lambda layers: Gemma3TextConfig(
        **_sizes(layers),
        head_dim=8,
        layer_types=["full_attention", "sliding_attention"] * (layers // 2) + ["full_attention"] * (layers % 2),
    ),
}


@functools.cache
def tiny_base(architecture: str = "llama", *, layers: int = 3, seed: int = 0, chat: bool = False) -> Path:
    """A directory with a tiny random model and its tokenizer, which lives as long as the process."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](layers), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4)  # logits of order one
    directory = tempfile.TemporaryDirectory(prefix="scalabl-tiny-")
    _KEPT.append(directory)
    model.save_pretrained(directory.name)
    tiny_tokenizer(chat=chat).save_pretrained(directory.name)
    return Path(directory.name)


@functools.cache
def tiny_encoder(*, layers: int = 3, seed: int = 0) -> Path:
    """A directory with a tiny random BERT without a head, and its tokenizer."""
    from transformers import BertModel

    torch.manual_seed(seed)
    sizes = {
        name: value for name, value in _sizes(layers).items() if name not in ("num_key_value_heads", "bos_token_id")
    }
    model = BertModel(BertConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # what a token says reaches the head
    directory = tempfile.TemporaryDirectory(prefix="scalabl-tiny-")
    _KEPT.append(directory)
    model.save_pretrained(directory.name)
    tiny_tokenizer().save_pretrained(directory.name)
    return Path(directory.name)


def write_texts(directory: Path, *, train: int = 30, validation: int = 9, test: int = 12) -> Path:
    """A directory of {"text", "label"} rows of three classes, each with a word of its own in a text."""
    for seed, (split, number) in enumerate((("train", train), ("validation", validation), ("test", test))):
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for i in range(number):
            words = [_WORDS[int(j)] for j in torch.randint(3, len(_WORDS), (1 + i % 4,), generator=generator)]
            words.insert(i % len(words), _WORDS[i % 3])
            rows.append({"text": f"{' '.join(words)} {i}", "label": f"about {_WORDS[i % 3]}"})
        write_jsonl(directory / f"{split}.jsonl", rows)
    return directory


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def loaded(architecture: str = "llama", **options: Any) -> tuple[PreTrainedModel, Any]:
    """The tiny model and its tokenizer, as `load_base` gives them."""
    return load_base(str(tiny_base(architecture, **options)))


def adapted(architecture: str = "llama", *, last: int | None = None, layers: int = 3, **config: Any) -> PeftModel:
    """The tiny model with a ScalaBL adapter whose B, A and posterior are as if trained; `last` adapts the last ones."""
    base, _ = loaded(architecture, layers=layers)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    if last is not None:
        settings["layers_to_transform"] = list(range(layers - last, layers))
    torch.manual_seed(1)
    model = get_peft_model(base, scalabl.ScalaBLConfig(task_type="CAUSAL_LM", **settings))
    perturb(model)
    return model.eval()


def require_peft() -> None:
    """Leave a test out where Transformers' own methods for adapters ask for a newer PEFT than is installed."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        pytest.skip(f"Transformers {transformers.__version__} asks for PEFT {MIN_PEFT_VERSION}")


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 2) -> None:
    """Move B away from zero and sigma to about a third of the means."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    for leaf in stochastic_layers(model).values():
        leaf.posterior.log_std.add_(2 + 0.3 * torch.randn(leaf.out_features, generator=generator))


_WORDS = ("red", "blue", "green", "stone", "a long answer", "yes", "no", "ninety-nine", "bee", "wide open")


def questions(number: int = 12, *, choices: Sequence[int] = (3, 4, 5), seed: int = 0) -> list[Example]:
    """Rows of unequal length with 3, 4 and 5 choices in turn; the right one is the alphabetically first."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(number):
        chosen = [_WORDS[j] for j in torch.randperm(len(_WORDS), generator=generator)[: choices[i % len(choices)]]]
        words = " ".join(_WORDS[j] for j in torch.randint(len(_WORDS), (2 + i % 4,), generator=generator))
        rows.append(Example(f"q{i}", f"{words} {i}?", tuple(chosen), chosen.index(min(chosen))))
    return rows


def as_json(row: Example) -> dict[str, Any]:
    """The JSONL form of a question."""
    return {"id": row.id, "question": row.question, "choices": list(row.choices), "answer": row.answer}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(directory: Path, *, train: int = 24, validation: int = 9, test: int = 12) -> Path:
    """A directory of train, validation and test rows."""
    for seed, (split, number) in enumerate((("train", train), ("validation", validation), ("test", test))):
        write_jsonl(directory / f"{split}.jsonl", map(as_json, questions(number, seed=seed)))
    return directory
