"""How many numbers the posterior adds to a LoRA at the shapes of published models, counted on the meta device.

    python benchmarks/extra_parameters.py

Every model is really built, and adapted by `get_peft_model` with `ScalaBLConfig`; its parameters are then counted.
Only the weights are missing: on the meta device a tensor has a shape and nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, facts, markdown_facts, markdown_table, write_results
from peft import get_peft_model
from shapes import SHAPES, Shape
from transformers import AutoModelForCausalLM

import scalabl

TARGETS = ("q_proj", "v_proj", "lm_head")
MODELS = ("qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b", "llama-2-7b")
COVARIANCES = ("diagonal", "full")


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, default=8, help="LoRA's rank")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=MODELS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results")
    arguments = parser.parse_args()
    models = {}
    for name in arguments.models:
        shape = SHAPES[name]
        counted = {covariance: count(shape, covariance, r=arguments.r) for covariance in COVARIANCES}
        models[name] = {"title": shape.title, "source": shape.source, **counted}
    known = facts(
        model=", ".join(SHAPES[name].title for name in arguments.models) + " (shapes; no weights)",
        data="none",
        seeds="none: nothing is drawn on the meta device",
        adapters=f"{', '.join(TARGETS)}, r = {arguments.r}",
        device="torch's meta device",
    )
    content = {"facts": known, "targets": list(TARGETS), "r": arguments.r, "models": models}
    write_results(arguments.output, "extra_parameters", content, markdown(content))
    print(markdown(content))


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    header = ["model", "adapted layers", "base", "LoRA", "posterior, diagonal", "/ LoRA", "posterior, full", "/ LoRA"]
    rows = []
    for model in content["models"].values():
        diagonal = model["diagonal"]
        shares = [
            cell
            for covariance in COVARIANCES
            for cell in (
                f"{model[covariance]['variational']:,}",
                f"{model[covariance]['variational'] / diagonal['lora']:.3%}",
            )
        ]
        title = f"[{model['title']}]({model['source']})"
        rows.append([title, str(diagonal["layers"]), f"{diagonal['base']:,}", f"{diagonal['lora']:,}", *shares])
    return f"""# Extra parameters of the posterior

{markdown_table(header, rows)}

A diagonal posterior has 2 r numbers a layer (mean and standard deviation of each s), a full one r (r + 3) / 2 (mean
and Cholesky factor). Both leave the number of LoRA parameters as it is.

{markdown_facts(content["facts"])}
"""


if __name__ == "__main__":
    main()
