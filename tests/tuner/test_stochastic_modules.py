"""stochastic_modules: some adapted modules have an uncertain s, the others are plain LoRA."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import adapt, close, load_base, logits, tokens
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

import scalabl
from scalabl.core.errors import UserError
from scalabl.tuner import StochasticProjection, stochastic_layers
from scalabl.tuner.diagnostics import weights_of

IDS = tokens(3)
V = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]
Q = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["v_proj"], V),
        ("v_proj", V),
        (["self_attn.q_proj"], Q),
        (["layers.1.self_attn.v_proj", "0.self_attn.q_proj"], [Q[0], V[1]]),
        ([V[0]], V[:1]),
        (["q_proj", "v_proj"], [Q[0], V[0], Q[1], V[1]]),
        (None, [Q[0], V[0], Q[1], V[1]]),
    ],
)
def test_the_named_modules_alone_have_a_posterior(named: Any, expected: list[str]) -> None:
    model = adapt(load_base(), stochastic_modules=named)
    assert list(stochastic_layers(model)) == expected
    for name in (*Q, *V):
        a = model.get_submodule(f"base_model.model.{name}").lora_A["default"]
        assert type(a) is (StochasticProjection if name in expected else nn.Linear)
    assert [layer.name for layer in weights_of(model)] == expected
    posteriors = {name.partition(".lora_A.")[0] for name in get_peft_model_state_dict(model) if ".posterior." in name}
    assert posteriors == {f"base_model.model.{name}" for name in expected}


def test_the_others_are_plain_loras_that_draw_nothing() -> None:
    model = adapt(load_base(), stochastic_modules=["v_proj"])
    x = torch.randn(1, 2, 64).expand(4, -1, -1)
    with scalabl.sample(model), torch.no_grad():
        for name, uncertain in ((Q[0], False), (V[0], True)):
            out = model.get_submodule(f"base_model.model.{name}")(x)
            assert torch.equal(out[0], out[1]) != uncertain
    plain = model.get_submodule(f"base_model.model.{Q[0]}").lora_A["default"].weight
    torch.manual_seed(11)
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(load_base(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    assert torch.equal(plain, lora.get_submodule(f"base_model.model.{Q[0]}").lora_A["default"].weight), (
        "LoRA's own draw"
    )


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_it_survives_saving_loading_folding_and_merging(covariance: str, tmp_path: Path) -> None:
    model = adapt(load_base(), stochastic_modules=["v_proj"], covariance=covariance).eval()
    answer = logits(model, IDS)
    with scalabl.particles(model, 3, seed=0):
        drawn = logits(model, IDS)
    assert not close(drawn, answer, 1e-3)
    model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["stochastic_modules"] == ["v_proj"]
    loaded = PeftModel.from_pretrained(load_base(), str(tmp_path)).eval()
    assert list(stochastic_layers(loaded)) == V
    assert torch.equal(logits(loaded, IDS), answer)
    with scalabl.particles(loaded, 3, seed=0):
        assert torch.equal(logits(loaded, IDS), drawn)
    mean = PeftModel.from_pretrained(load_base(), str(tmp_path / "mean")).eval()
    assert not any("posterior" in name for name in get_peft_model_state_dict(mean))
    assert close(logits(mean, IDS), answer, 1e-5)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, IDS), logits(load_base(), IDS))
    assert close(logits(loaded.merge_and_unload(), IDS), answer, 1e-5)


def test_training_reaches_plain_and_uncertain_modules_and_the_kl_the_uncertain_ones_alone() -> None:
    model = adapt(load_base(), stochastic_modules=["v_proj"]).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if p.requires_grad)
    assert sum(p.numel() for n, p in model.named_parameters() if ".posterior." in n) == 2 * 2 * 4
    model.zero_grad()
    scalabl.kl_divergence(model).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if ".posterior." in n
    }


@pytest.mark.parametrize("named", [[], "", ["v_proj", ""]])
def test_naming_nothing_is_refused(named: Any) -> None:
    with pytest.raises(UserError, match="stochastic_modules names no module; name at least one"):
        scalabl.ScalaBLConfig(stochastic_modules=named)


@pytest.mark.parametrize("named", [["down_proj"], ["proj"], ["v_proj", "k_proj"], ["layers.7.self_attn.v_proj"]])
def test_a_name_that_matches_no_adapted_module_is_refused_and_the_model_left_as_it_was(named: list[str]) -> None:
    base = load_base()
    names, answer = list(base.state_dict()), logits(base, IDS)
    with pytest.raises(
        UserError, match=rf"names {named[-1]}, but no adapted module ends in it; name some of q_proj, v_p"
    ):
        adapt(base, stochastic_modules=named)
    assert list(base.state_dict()) == names and torch.equal(logits(base, IDS), answer)


def test_a_second_adapter_is_held_against_its_own_modules() -> None:
    model = adapt(load_base(), stochastic_modules=["v_proj"]).eval()
    answer = logits(model, IDS)
    config = {"r": 2, "target_modules": ["q_proj", "o_proj"]}
    with pytest.raises(UserError, match="names v_proj, but no adapted module ends in it; name some of o_proj, q_proj"):
        model.add_adapter("other", scalabl.ScalaBLConfig(**config, stochastic_modules=["v_proj"]))
    assert not any(".other." in name for name in model.state_dict()) and "other" not in model.peft_config
    assert torch.equal(logits(model, IDS), answer)
    model.add_adapter("other", scalabl.ScalaBLConfig(**config, stochastic_modules=["o_proj"]))
    assert list(stochastic_layers(model)) == V
    assert [name.rpartition(".")[2] for name in stochastic_layers(model, "other")] == ["o_proj", "o_proj"]


@pytest.mark.parametrize(
    ("options", "sentence"), [({"draws": "epoch"}, "draws is 'epoch'; it must be sequence or batch")]
)
def test_other_values_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        scalabl.ScalaBLConfig(**options)
