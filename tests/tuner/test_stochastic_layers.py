"""`stochastic_layers`: s is uncertain in the top layers, the others are plain LoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import adapt, load_base, logits, perturb, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import scalabl
from scalabl.core.errors import UserError
from scalabl.core.modules import check_spec, holding_variance, top_layers
from scalabl.tuner import stochastic_layers
from scalabl.tuner.layers import depths

IDS = tokens(3)
Q = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
HEAD = ["q_proj", "lm_head"]


def layers_of(spec: str | None, **config: Any) -> list[str]:
    return list(stochastic_layers(adapt(load_base(num_hidden_layers=4), stochastic_layers=spec, **config)))


@pytest.mark.parametrize(
    ("spec", "config", "expected"),
    [
        (None, {"target_modules": ["q_proj"]}, Q),
        ("last:4", {"target_modules": ["q_proj"]}, Q),
        ("last:1", {"target_modules": ["q_proj"]}, Q[3:]),
        ("last:0.25", {"target_modules": ["q_proj"]}, Q[3:]),
        ("last:0.3", {"target_modules": ["q_proj"]}, Q[2:]),
        ("last:1.0", {"target_modules": ["q_proj"]}, Q),
        # of the adapted layers, which need not be the model's last
        ("last:1", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, [Q[2]]),
        ("last:1", {"target_modules": r".*layers\.[01]\.self_attn\.q_proj"}, [Q[1]]),
        ("last:1", {"target_modules": HEAD}, ["lm_head"]),
        ("last:2", {"target_modules": HEAD}, [Q[3], "lm_head"]),
        # and of the stochastic modules among them
        ("last:1", {"target_modules": HEAD, "stochastic_modules": ["q_proj"]}, [Q[3]]),
    ],
)
def test_which_layers_are_stochastic(spec: str | None, config: dict[str, Any], expected: list[str]) -> None:
    assert layers_of(spec, **config) == expected


def test_every_linear_layer_of_the_last() -> None:
    found = layers_of("last:1", target_modules="all-linear")
    assert len(found) == 7 and all(name.startswith("model.layers.3.") for name in found)


def test_a_module_below_is_loras_own() -> None:
    model = adapt(load_base(), trained=False, stochastic_layers="last:1")
    lora = get_peft_model(load_base(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    below = model.get_submodule(f"base_model.model.{Q[0]}").lora_A["default"]
    assert type(below) is torch.nn.Linear
    assert below.weight.shape == lora.get_submodule(f"base_model.model.{Q[0]}").lora_A["default"].weight.shape
    assert below.weight.requires_grad


def test_saving_loading_and_the_mean_directory(tmp_path: Path) -> None:
    model = adapt(load_base(), stochastic_layers="last:1").eval()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load_base(), str(tmp_path)).eval()
    assert list(stochastic_layers(loaded)) == list(stochastic_layers(model)) and len(stochastic_layers(model)) == 2
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    with scalabl.particles(model, 3), scalabl.particles(loaded, 3):
        assert torch.equal(logits(loaded, IDS), logits(model, IDS))
        assert not torch.equal(logits(model, IDS)[0], logits(model, IDS[[0, 0, 0]])[1])
    mean = PeftModel.from_pretrained(load_base(), str(tmp_path / "mean")).eval()
    torch.testing.assert_close(logits(mean, IDS), logits(model, IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "spec", ["", "last", "last:", "last:0", "last:-1", "last:0.0", "last:1.5", "top:2", "last:nan"]
)
def test_a_specification_that_names_nothing_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="it must be last:K, or a fraction of them, last:0.25"):
        scalabl.ScalaBLConfig(stochastic_layers=spec)


def test_variance_is_not_known_before_there_is_a_posterior() -> None:
    with pytest.raises(UserError, match="it must be last:K"):
        scalabl.ScalaBLConfig(stochastic_layers="variance:0.9")
    assert check_spec("variance:0.9", variance=True) == ("variance", 0.9)
    for spec in ("variance:0", "variance:1.1", "variance:"):
        with pytest.raises(UserError, match="variance:0.9"):
            check_spec(spec, variance=True)


def test_more_layers_than_there_are_is_refused_and_the_model_left_as_it_was() -> None:
    base = load_base()
    names, answer = list(base.state_dict()), logits(base, IDS)
    with pytest.raises(UserError, match="stochastic_layers is 'last:3', but s is uncertain in 2 layers at most"):
        adapt(base, stochastic_layers="last:3")
    assert list(base.state_dict()) == names and torch.equal(logits(base, IDS), answer)


def test_depths_by_name() -> None:
    model = adapt(load_base(), target_modules=HEAD)
    names = ["model.layers.1.mlp", "base_model.model.model.layers.0.self_attn", "lm_head", "model.embed_tokens"]
    assert list(depths(model, names).values()) == [1, 0, 2, 0]
    assert list(depths(model.get_base_model(), names).values()) == [1, 0, 2, 0]


def test_the_fewest_top_layers_that_hold_a_share() -> None:
    found = {"a": 0, "b": 1, "c": 1, "d": 5}
    variances = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    specs = {share: holding_variance(found, variances, share) for share in (0.1, 0.4, 0.41, 0.9, 0.91, 1.0)}
    assert specs == {0.1: "last:1", 0.4: "last:1", 0.41: "last:2", 0.9: "last:2", 0.91: "last:3", 1.0: "last:3"}
    assert top_layers(found, "last:2") == ["b", "c", "d"]


def encoder_decoder(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(**sizes, num_layers=3, num_decoder_layers=2)).eval()
    sizes = {"vocab_size": 96, "d_model": 16, "max_position_embeddings": 32}
    sizes |= {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    return BartForConditionalGeneration(
        BartConfig(**{**sizes, "encoder_layers": 3, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16})
    ).eval()


@pytest.mark.parametrize(
    ("kind", "targets", "last", "encoder"),
    [
        ("t5", ["q", "v"], "decoder.block.1.", "encoder.block.2."),
        ("bart", ["q_proj", "v_proj"], "model.decoder.layers.1.", "model.encoder.layers.2."),
    ],
)
def test_the_decoder_follows_the_encoder(kind: str, targets: list[str], last: str, encoder: str) -> None:
    options: dict[str, Any] = {"r": 4, "target_modules": targets, "task_type": "SEQ_2_SEQ_LM"}
    top = get_peft_model(encoder_decoder(kind), scalabl.ScalaBLConfig(**options, stochastic_layers="last:1"))
    assert len(stochastic_layers(top)) == 4  # of attention to itself and to the encoder
    assert all(name.startswith(last) for name in stochastic_layers(top))
    three = get_peft_model(encoder_decoder(kind), scalabl.ScalaBLConfig(**options, stochastic_layers="last:3"))
    assert {name for name in stochastic_layers(three) if "encoder." in name and name.startswith(encoder)}
    assert not [name for name in stochastic_layers(three) if name.startswith(encoder.replace("2", "1"))]

    model = get_peft_model(encoder_decoder(kind), scalabl.ScalaBLConfig(**options)).eval()
    perturb(model)
    source, target = IDS, IDS[:, :3]
    with torch.no_grad():
        with scalabl.particles(model, 2, seed=0):
            both = model(input_ids=source.repeat(2, 1), decoder_input_ids=target.repeat(2, 1)).logits
        for number in (0, 1):
            with scalabl.particles(model, 1, seed=0, first=number):
                one = model(input_ids=source, decoder_input_ids=target).logits
            torch.testing.assert_close(both[3 * number : 3 * number + 3], one, atol=1e-5, rtol=1e-4)
        assert (both[:3] - both[3:]).abs().max() > 1e-3
