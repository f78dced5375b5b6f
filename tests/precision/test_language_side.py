"""An adapter of an image-text model is on its language side, whatever the names of its image side."""

from pathlib import Path
from typing import Any

import pytest
from image_text import adapted, image_text_base
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from scalabl.core.errors import UserError
from scalabl.runs.method import load_method
from scalabl.runs.models import load_base
from scalabl.runs.settings import Settings
from scalabl.scoring import Letters, Scorer
from scalabl.scoring.trunk import Trunk
from scalabl.tuner import stochastic_layers
from scalabl.tuner.layers import decoder_layers


def test_targets_are_of_the_language_side_alone(architecture: str) -> None:
    base, _ = load_base(str(image_text_base(architecture)))
    everywhere = {n for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    # names that the image side has too
    shared = {"gemma3": "q_proj", "qwen2_5_vl": "gate_proj", "qwen3_vl": "linear_fc1"}[architecture]
    assert any(name.endswith(shared) and "language_model" not in name for name in everywhere)
    for targets in (["q_proj", "v_proj"], ["q_proj", "gate_proj", "lm_head"], "all-linear"):
        model, _ = adapted(architecture, target_modules=targets)
        names = list(stochastic_layers(model))
        assert names and all(name.startswith("model.language_model.") or name == "lm_head" for name in names)
        assert len([n for n in names if n.endswith("q_proj")]) == 3
        assert ("lm_head" in names) == ("lm_head" in targets)
    with pytest.raises(UserError, match="adapts no layer"):
        adapted(architecture, target_modules=["fc1", "linear_fc1", "qkv"])
    inside, _ = adapted(architecture, target_modules=r"model\.(vision_tower|visual)\..*(fc1|gate_proj|linear_fc1)")
    assert all("language_model" not in name for name in stochastic_layers(inside))


def test_every_method_and_mean_adapter_keep_to_the_language_side(architecture: str, tmp_path: Path) -> None:
    base, _ = load_base(str(image_text_base(architecture)))
    for method in ("mle", "scalabl", "blob"):
        config: Any = load_method(method).adapter_config(Settings.flat(target_modules="q_proj", layers="last:1"), base)
        model = get_peft_model(base, config)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all("language_model.layers.2.self_attn.q_proj" in name for name in trained), method
        base = model.unload()
    model, _ = adapted(architecture)
    model.save_pretrained(str(tmp_path))
    plain = LoraConfig.from_pretrained(str(tmp_path / "mean"))
    assert plain.exclude_modules
    loaded = PeftModel.from_pretrained(load_base(str(image_text_base(architecture)))[0], str(tmp_path / "mean"))
    adapted_names = {n.partition(".lora_A")[0] for n, _ in loaded.named_parameters() if "lora_A" in n}
    assert len(adapted_names) == 6 and all("language_model" in name for name in adapted_names)


def test_depth_is_counted_in_the_language_side(architecture: str) -> None:
    """The image side has more layers."""
    model, tokenizer = adapted(architecture, stochastic_layers="last:1", target_modules=["q_proj"])
    layers = decoder_layers(model)
    assert len(layers) == 3 and hasattr(layers[0], "self_attn")
    assert layers[2] is model.get_base_model().model.language_model.layers[2]
    assert list(stochastic_layers(model)) == ["model.language_model.layers.2.self_attn.q_proj"]
    assert Scorer(model, Letters(tokenizer), Trunk(model)).trunk is None, "no trunk: see Scorer"
