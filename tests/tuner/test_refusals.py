"""Bad configurations and wrong base models: one sentence each."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import FORMATS, VOCABULARY, adapt, load_base, logits, tokens
from peft import (
    LoraConfig,
    LoraRuntimeConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora import MontecloraConfig
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, XLNetConfig, XLNetLMHeadModel

import scalabl
from scalabl.core.errors import UserError
from scalabl.tuner import stochastic_layers
from scalabl.tuner.model import fingerprint, is_base

UNSUPPORTED: dict[str, Any] = {
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [(0, 2)],
    "alora_invocation_tokens": [1],
    "monteclora_config": MontecloraConfig(),
    "trainable_token_indices": [1, 2],
    "megatron_config": {"tensor_parallel": 1},
    "ensure_weight_tying": True,
    "runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True),
}


@pytest.mark.parametrize(("option", "value"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_an_unsupported_option_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(UserError, match=f"does not support LoRA's option {option}"):
        scalabl.ScalaBLConfig(**{option: value})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "mica"])
def test_an_initialisation_of_loras_own_is_refused(init: str) -> None:
    with pytest.raises(UserError, match="leave it at True"):
        scalabl.ScalaBLConfig(init_lora_weights=init)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prior_std": 0.0}, "prior std must be a positive number"),
        ({"prior_std": -1.0}, "prior std must be a positive number"),
        ({"prior_mean": float("nan")}, "prior mean must be a finite number"),
        ({"init_sigma": 0.0}, "init_sigma is 0.0; it must be positive"),
        ({"init_sigma": float("nan")}, "init_sigma is nan; it must be positive"),
        ({"init_sigma": float("inf")}, "init_sigma is inf; it must be positive"),
        ({"covariance": "low-rank"}, "covariance is 'low-rank'; it must be one of diagonal, full"),
        ({"r": 0}, "r is 0; it must be a positive integer"),
        ({"r": -8}, "r is -8; it must be a positive integer"),
        ({"rank_pattern": {"q_proj": 0}}, "r is 0; it must be a positive integer"),
    ],
)
def test_a_value_out_of_range_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        scalabl.ScalaBLConfig(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_modules": ["query"]}, r"\['query'\] adapts no layer of this model.*k_proj, lm_head, o_proj, q_proj"),
        ({"target_modules": r".*\.query"}, "adapts no layer of this model"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "adapts no layer of this model"),
        ({"layers_to_transform": [7]}, "adapts no layer of this model"),
        ({"r": 33}, "r is 33, but model.layers.0.self_attn.v_proj has only 32 dimensions"),
        ({"rank_pattern": {"v_proj": 40}}, "r is 40, but model.layers.0.self_attn.v_proj has only 32"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding; remove it"),
        (
            {"target_modules": ["q_proj", "query"]},
            "target_modules names query, but no linear module ends in it; name some of down_proj, gate_proj",
        ),
    ],
)
def test_targets_that_do_not_fit_the_model_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        adapt(load_base(), **options)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(UserError, match=f"0 is a {kind.__name__}; remove it from target_modules"):
        get_peft_model(nn.Sequential(kind(4, 4, 1)), scalabl.ScalaBLConfig(r=2, target_modules=["0"]))


def test_attention_modules_with_fused_projections_are_refused() -> None:
    with pytest.raises(UserError, match="0 is a MultiheadAttention; remove it from target_modules"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(4, 2)), scalabl.ScalaBLConfig(r=2, target_modules=["0"]))


def test_a_refusal_in_the_middle_of_the_layers_leaves_the_model_as_it_was() -> None:
    base, ids = load_base(), tokens(2)
    names, answer = list(base.state_dict()), logits(base, ids)
    for options in ({"r": 33}, {"target_modules": ["q_proj", "embed_tokens"]}):
        with pytest.raises(UserError):
            adapt(base, **options)
        assert list(base.state_dict()) == names and torch.equal(logits(base, ids), answer)
    model = adapt(base).eval()
    names, answer = list(model.state_dict()), logits(model, ids)
    with pytest.raises(UserError, match="r is 33"):
        model.add_adapter("other", scalabl.ScalaBLConfig(r=33, target_modules=["q_proj", "v_proj"]))
    assert list(model.state_dict()) == names and torch.equal(logits(model, ids), answer)


def test_a_name_whose_layers_are_left_out_is_no_mistake() -> None:
    model = adapt(load_base(), exclude_modules=["q_proj"])
    assert {name.rpartition(".")[2] for name in stochastic_layers(model)} == {"v_proj"}
    model.add_adapter("other", scalabl.ScalaBLConfig(r=2, target_modules=["q_proj", "o_proj"], layers_to_transform=[0]))
    with pytest.raises(UserError, match="target_modules names query, .* name some of down_proj, gate_proj, k_proj"):
        model.add_adapter("third", scalabl.ScalaBLConfig(r=2, target_modules=["v_proj", "query"]))
    assert list(model.peft_config) == ["default", "other"]


def test_a_saved_adapter_is_loaded_with_names_that_match_nothing(tmp_path: Path) -> None:
    """As older ones may have."""
    model = adapt(load_base())
    model.peft_config["default"].target_modules = {"q_proj", "v_proj", "query"}
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load_base(), str(tmp_path))
    assert torch.equal(logits(loaded.eval(), tokens(1)), logits(model.eval(), tokens(1)))


@pytest.mark.parametrize("targets", [["q_proj", "gate_up_proj"], ["gate_up_proj"]])
def test_fused_experts_are_refused_beside_other_targets(targets: list[str]) -> None:
    base = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, head_dim=8,
        )
    )  # fmt: skip
    assert any(name.endswith("experts.gate_up_proj") for name, _ in base.named_parameters())
    with pytest.raises(UserError, match="gate_up_proj"):
        get_peft_model(base, scalabl.ScalaBLConfig(r=2, target_modules=targets))


@pytest.mark.parametrize("name", ["mean", "posterior", "a.b", ""])
def test_names_that_stand_for_something_else_are_refused(name: str) -> None:
    model = adapt(load_base())
    with pytest.raises(UserError, match="cannot be named .* give it another name"):
        model.add_adapter(name, scalabl.ScalaBLConfig(r=2, target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]
    assert logits(model, tokens(1)).isfinite().all()


def test_layers_that_see_positions_before_rows_are_refused() -> None:
    base = XLNetLMHeadModel(XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=16))
    with pytest.raises(UserError, match="A xlnet model lays positions before rows"):
        get_peft_model(base, scalabl.ScalaBLConfig(r=2, target_modules=["layer_1"]))


class Experts(nn.Module):
    """An expert layer as mixtures of experts have it: it sees tokens without their sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.expert = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.gate(x).argmax(dim=-1) == 0
        out = x.clone()
        out[chosen] = self.expert(x[chosen])
        return out


def test_expert_layers_with_flattened_tokens_are_refused() -> None:
    model = get_peft_model(Experts(), scalabl.ScalaBLConfig(r=2, target_modules=["expert"]))
    with pytest.raises(UserError, match="remove expert layers"):
        model.train()(torch.randn(3, 5, 8))
    assert model.eval()(torch.randn(3, 5, 8)).shape == (3, 5, 8), "the mean belongs to no sequence"


def test_weighted_sums_of_adapters_are_refused() -> None:
    model = adapt(load_base())
    model.add_adapter("other", scalabl.ScalaBLConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapt(load_base()).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="trained on another base model.*load the base model named in"):
        PeftModel.from_pretrained(load_base(seed=1), str(tmp_path))
    with pytest.raises(UserError, match="trained on another base model"):
        PeftModel.from_pretrained(load_base("qwen2"), str(tmp_path))


def test_resized_embeddings_do_not_change_the_bases_identity(tmp_path: Path) -> None:
    model = adapt(load_base())
    answer = logits(model.eval(), tokens(2))
    model.save_pretrained(str(tmp_path / "before"))
    base = load_base()
    base.resize_token_embeddings(VOCABULARY + 4)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "before")).eval()
    torch.testing.assert_close(logits(loaded, tokens(2))[..., :VOCABULARY], answer)

    model.resize_token_embeddings(VOCABULARY + 4)
    model.save_pretrained(str(tmp_path / "after"), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(load_base(), str(tmp_path / "after")).eval()
    torch.testing.assert_close(logits(loaded, tokens(2)), answer)
    other = load_base(seed=1)
    other.resize_token_embeddings(VOCABULARY + 4)
    with pytest.raises(UserError, match="trained on another base model"):
        PeftModel.from_pretrained(other, str(tmp_path / "after"))


def test_a_fingerprint_with_the_size_of_the_vocabulary_is_known(tmp_path: Path) -> None:
    base = load_base()
    norms = [p.detach() for name, p in base.named_parameters() if "norm" in name]
    sizes = f"model_type=llama;hidden_size=64;num_hidden_layers=2;vocab_size={VOCABULARY};"
    weights = b"".join(p.to(torch.bfloat16).view(torch.int16).numpy().tobytes() for p in (norms[0], norms[-1]))
    older = hashlib.sha256(sizes.encode() + weights).hexdigest()[:16]
    assert older != fingerprint(base) and is_base(base, older)
    model = adapt(base)
    model.peft_config["default"].base_fingerprint = older
    model.save_pretrained(str(tmp_path))
    PeftModel.from_pretrained(load_base(), str(tmp_path))
    with pytest.raises(UserError, match="trained on another base model"):
        PeftModel.from_pretrained(load_base(seed=1), str(tmp_path))


@pytest.mark.parametrize("trained_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMATS, ids=[form.name for form in FORMATS])
def test_the_same_base_in_another_format_is_accepted(trained_in: str, form: Any, tmp_path: Path) -> None:
    model = adapt(load_base(form=next(f for f in FORMATS if f.name == trained_in)))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load_base(form=form), str(tmp_path))
    assert logits(loaded.eval(), tokens(1)).isfinite().all()


def test_a_float32_base_may_return_in_float16_and_the_other_way_round(tmp_path: Path) -> None:
    """Rounding twice, to float16 and to bfloat16, is not rounding once."""
    half = type(FORMATS[0])("float16", lambda: {"dtype": torch.float16}, 1e-2, torch.float16)
    adapt(load_base()).save_pretrained(str(tmp_path / "float32"))
    PeftModel.from_pretrained(load_base(form=half), str(tmp_path / "float32"))
    adapt(load_base(form=half)).save_pretrained(str(tmp_path / "float16"))
    PeftModel.from_pretrained(load_base(), str(tmp_path / "float16"))


def test_a_trained_copy_of_a_normalisation_layer_does_not_change_the_bases_identity() -> None:
    model = adapt(load_base(), modules_to_save=["norm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    model.add_adapter("other", scalabl.ScalaBLConfig(r=2, target_modules=["q_proj"]))
    first, other = (model.peft_config[name].base_fingerprint for name in ("default", "other"))
    assert first == other and first is not None


def test_a_plain_adapter_is_not_added_to_a_bayesian_model() -> None:
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapt(load_base()).add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
