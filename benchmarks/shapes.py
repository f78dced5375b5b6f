"""The shapes of published models, without their weights.

Each is the model's own `config.json` on huggingface.co (the address in `source`), cut down to what decides shapes.
`parameters` is the number of parameters that its safetensors files hold: a check that the shape is the right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config


@dataclass(frozen=True)
class Shape:
    """A published model's architecture."""

    title: str
    source: str
    config_class: type[PretrainedConfig]
    settings: dict[str, Any]
    parameters: int

    def config(self) -> PretrainedConfig:
        """The transformers configuration."""
        return self.config_class(**self.settings)


def _qwen(
    size: str, hidden: int, intermediate: int, layers: int, heads: tuple[int, int], eps: float, parameters: int
) -> Shape:
    settings = {
        "vocab_size": 152064,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "rms_norm_eps": eps,
        "tie_word_embeddings": False,
    }
    source = f"https://huggingface.co/Qwen/Qwen2.5-{size}/blob/main/config.json"
    return Shape(f"Qwen2.5-{size}", source, Qwen2Config, settings, parameters)


SHAPES = {
    "qwen2.5-7b": _qwen("7B", 3584, 18944, 28, (28, 4), 1e-6, 7_615_616_512),
    "qwen2.5-14b": _qwen("14B", 5120, 13824, 48, (40, 8), 1e-5, 14_770_033_664),
    "qwen2.5-32b": _qwen("32B", 5120, 27648, 64, (40, 8), 1e-5, 32_763_876_352),
    "llama-2-7b": Shape(
        "Llama-2-7B",
        "https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json",
        LlamaConfig,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        6_738_415_616,
    ),
    # two layers of a Llama, to see that a benchmark runs
    "tiny": Shape(
        "a two-layer Llama",
        "made up",
        LlamaConfig,
        {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        90_432,
    ),
}
