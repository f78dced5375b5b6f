"""LoRA's own options under ScalaBL: each one saved, loaded and folded into mean/."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import adapt, close, load_base, logits, tokens
from peft import LoraConfig, PeftModel

import scalabl
from scalabl.tuner import stochastic_layers
from scalabl.tuner.config import SUPPORTED_LORA_OPTIONS

IDS = tokens(3)
Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"

# option -> a value that is not its default
OPTIONS: dict[str, dict[str, Any]] = {
    "r": {"r": 3},
    "lora_alpha": {"lora_alpha": 5},
    "target_modules": {"target_modules": r".*\.[qv]_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude_modules": {"exclude_modules": [V1]},
    "lora_dropout": {"lora_dropout": 0.5},
    "bias": {"bias": "all"},
    "bias of the adapted layers": {"bias": "lora_only"},
    "use_rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["norm", "lm_head"]},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
    "no init_lora_weights": {"init_lora_weights": False},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "rank_pattern": {"rank_pattern": {Q0: 2, "v_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {Q0: 32}},
    "inference_mode": {"inference_mode": True},
    "task_type": {"task_type": "CAUSAL_LM"},
    "revision": {"revision": "main"},
}
# written by PEFT itself, or (fan_in_fan_out) covered by GPT-2 in the matrix
WRITTEN_BY_PEFT = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "fan_in_fan_out"}


def test_every_supported_option_is_covered() -> None:
    assert {f.name for f in fields(LoraConfig)} >= SUPPORTED_LORA_OPTIONS
    assert {name for options in OPTIONS.values() for name in options} >= SUPPORTED_LORA_OPTIONS - WRITTEN_BY_PEFT


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_option_survives_saving_loading_folding_and_merging(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapt(load_base("qwen2"), **options)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:  # biases and saved modules are trained too
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    answer = logits(model.eval(), IDS)
    with scalabl.particles(model, 3, seed=0):
        drawn = logits(model, IDS)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load_base("qwen2"), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, IDS), answer)
    with scalabl.particles(loaded, 3, seed=0):
        assert torch.equal(logits(loaded, IDS), drawn)
    plain = PeftModel.from_pretrained(load_base("qwen2"), str(tmp_path / "mean")).eval()
    assert close(logits(plain, IDS), answer, 1e-5)
    assert close(logits(loaded.merge_and_unload(), IDS), answer, 1e-5)


def test_patterns_reach_the_layers_they_name() -> None:
    model = adapt(load_base(), rank_pattern={Q0: 2}, alpha_pattern={"v_proj": 32})
    assert {name: leaf.posterior.r for name, leaf in stochastic_layers(model).items() if leaf.posterior.r != 4} == {
        Q0: 2
    }
    scaling = {name: model.get_submodule(f"base_model.model.{name}").scaling["default"] for name in (Q0, V1)}
    assert scaling == {Q0: 4.0, V1: 8.0}
    assert list(stochastic_layers(adapt(load_base(), exclude_modules=[Q0], layers_to_transform=[0]))) == [
        "model.layers.0.self_attn.v_proj"
    ]


def test_dropout_acts_while_training_alone() -> None:
    model = adapt(load_base(), lora_dropout=0.5)
    with scalabl.mean(model):
        assert not close(logits(model.train(), IDS), logits(model.eval(), IDS), 1e-3)
    assert torch.equal(logits(model, IDS), logits(model, IDS))


def test_four_bit_layers_are_not_packed_for_prediction_by_a_cpu_that_could() -> None:
    """bitsandbytes packs them at their first pass without gradient and never unpacks them for training."""
    bnb = pytest.importorskip("bitsandbytes")
    base = load_base()
    layer = bnb.nn.Linear4bit(8, 8)
    layer.support_avx512bf16_for_cpu = True  # as it is on such a machine
    base.add_module("beside", layer)
    adapt(base, target_modules=["q_proj"])
    assert layer.support_avx512bf16_for_cpu is False
