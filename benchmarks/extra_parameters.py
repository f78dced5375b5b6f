"""How many numbers the posterior adds to a LoRA at the shapes of published models, counted on the meta device.

    python benchmarks/extra_parameters.py

Every model is really built, and adapted by `get_peft_model` with `ScalaBLConfig`; its parameters are then counted.
Only the weights are missing: on the meta device a tensor has a shape and nothing else. A shape is the model's own
`config.json` on huggingface.co (the address in `source`), cut down to what decides shapes; `parameters` is the number
of parameters that its safetensors files hold: a check that the shape is the right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from harness import RESULTS, facts, markdown_facts, options, table, write_results
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

import scalabl

TARGETS = ("q_proj", "v_proj", "lm_head")
MODELS = ("qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b", "llama-2-7b")
COVARIANCES = ("diagonal", "full")


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


def _shape(
    title: str, source: str, kind: type[PretrainedConfig], sizes: tuple[int, ...], parameters: int, **more: Any
) -> Shape:
    """`sizes`: vocabulary, hidden, intermediate, layers, attention heads, heads of keys and values."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    settings = dict(zip((*names, "num_key_value_heads"), sizes, strict=True)) | {"tie_word_embeddings": False} | more
    return Shape(title, source, kind, settings, parameters)


_QWEN = "https://huggingface.co/Qwen/Qwen2.5-{}/blob/main/config.json"
_LLAMA = "https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json"
SHAPES = {
    "qwen2.5-7b": _shape(
        "Qwen2.5-7B", _QWEN.format("7B"), Qwen2Config, (152064, 3584, 18944, 28, 28, 4), 7_615_616_512,
        rms_norm_eps=1e-6,
    ),
    "qwen2.5-14b": _shape(
        "Qwen2.5-14B", _QWEN.format("14B"), Qwen2Config, (152064, 5120, 13824, 48, 40, 8), 14_770_033_664,
        rms_norm_eps=1e-5,
    ),
    "qwen2.5-32b": _shape(
        "Qwen2.5-32B", _QWEN.format("32B"), Qwen2Config, (152064, 5120, 27648, 64, 40, 8), 32_763_876_352,
        rms_norm_eps=1e-5,
    ),
    "llama-2-7b": _shape(
        "Llama-2-7B", _LLAMA, LlamaConfig, (32000, 4096, 11008, 32, 32, 32), 6_738_415_616, rms_norm_eps=1e-5
    ),
    # two layers of a Llama, to see that a benchmark runs
    "tiny": _shape(
        "a two-layer Llama", "made up", LlamaConfig, (256, 64, 128, 2, 4, 2), 90_432, tie_word_embeddings=True
    ),
}  # fmt: skip


def count(shape: Shape, covariance: str, *, r: int = 8, targets: tuple[str, ...] = TARGETS) -> dict[str, int]:
    """Parameters of the base, of LoRA (A and B) and of the posterior; the number of adapted layers."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shape.config())
    settings: dict[str, Any] = {"r": r, "lora_alpha": 2 * r, "covariance": covariance}
    model = get_peft_model(base, scalabl.ScalaBLConfig(target_modules=list(targets), **settings))
    numbers = {"base": 0, "lora": 0, "variational": 0}
    for name, parameter in model.named_parameters():
        kind = "variational" if ".posterior." in name else "lora" if "lora_" in name else "base"
        numbers[kind] += parameter.numel()
    return numbers | {"layers": len(scalabl.stochastic_layers(model))}


def main() -> None:
    """Count, and write extra_parameters.json and .md."""
    models_ = (list(MODELS), None, SHAPES)
    output = (RESULTS, "directory of the results")
    a = options(__doc__, r=(8, "LoRA's rank"), models=models_, output=output).parse_args()
    models = {}
    for name in a.models:
        shape = SHAPES[name]
        counted = {covariance: count(shape, covariance, r=a.r) for covariance in COVARIANCES}
        models[name] = {"title": shape.title, "source": shape.source, **counted}
    known = facts(
        model=", ".join(SHAPES[name].title for name in a.models) + " (shapes; no weights)",
        data="none",
        seeds="none: nothing is drawn on the meta device",
        adapters=f"{', '.join(TARGETS)}, r = {a.r}",
        device="torch's meta device",
    )
    content = {"facts": known, "targets": list(TARGETS), "r": a.r, "models": models}
    write_results(a.output, "extra_parameters", content, markdown(content))


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    columns: list[Any] = [
        ("model", "[{title}]({source})"),
        ("adapted layers", "{diagonal[layers]}"),
        ("base", "{diagonal[base]:,}"),
        ("LoRA", "{diagonal[lora]:,}"),
    ]
    for kind in COVARIANCES:
        columns.append((f"posterior, {kind}", f"{{{kind}[variational]:,}}"))
        columns.append(("/ LoRA", lambda m, kind=kind: f"{m[kind]['variational'] / m['diagonal']['lora']:.3%}"))
    shown = table(list(content["models"].values()), *columns)
    return f"""# Extra parameters of the posterior

{shown}

A diagonal posterior has 2 r numbers a layer (mean and standard deviation of each s), a full one r (r + 3) / 2 (mean
and Cholesky factor). Both leave the number of LoRA parameters as it is.

{markdown_facts(content["facts"])}
"""


if __name__ == "__main__":
    main()
