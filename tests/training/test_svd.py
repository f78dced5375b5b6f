"""A plain LoRA and its ScalaBL form are the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from plain_lora import bayesian, letters, plain_adapter
from safetensors.torch import load_file, save_file
from tiny_base import loaded

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER
from scalabl.runs.loading import load_adapter
from scalabl.training.posthoc.svd import factorise, scalabl_config, scalabl_tensors
from scalabl.tuner import stochastic_layers

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "patterns": (
        "llama",
        {"rank_pattern": {"v_proj": 7}, "alpha_pattern": {"v_proj": 3}, "target_modules": "all-linear"},
    ),
    "rslora": ("qwen2", {"use_rslora": True, "r": 6, "bias": "lora_only"}),
    "output layer": ("llama", {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "gaussian"}),
    "some layers": ("gemma3", {"layers_to_transform": [1], "lora_dropout": 0.3, "modules_to_save": ["norm"]}),
    "regular expression": ("qwen3", {"target_modules": r".*\.(gate_proj|o_proj)", "init_lora_weights": "orthogonal"}),
    "unused components": ("llama", {"zero_columns": 3}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_predictions_are_those_of_the_plain_adapter(name: str, tmp_path: Path) -> None:
    architecture, options = CONFIGURATIONS[name]
    source = plain_adapter(tmp_path / "plain", architecture, **options)
    config = scalabl_config(LoraConfig.from_pretrained(str(source)), covariance="full")
    made = tmp_path / "made"
    made.mkdir()
    save_file(scalabl_tensors(load_file(source / ADAPTER), config), made / ADAPTER)
    config.save_pretrained(str(made))

    tokens = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    plain = PeftModel.from_pretrained(loaded(architecture)[0], str(source)).eval()
    ours = load_adapter(loaded(architecture)[0], made)
    with torch.no_grad():
        expected, found = plain(tokens).logits, ours(tokens).logits
        base = loaded(architecture)[0](tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert (base - expected).abs().max() > 0.1  # the adapter does something
    for leaf in stochastic_layers(ours).values():
        assert torch.equal(leaf.posterior.mean, torch.ones(leaf.out_features))
        torch.testing.assert_close(leaf.direction @ leaf.direction.T, torch.eye(leaf.out_features), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("r", "d_in", "d_out"), [(1, 5, 9), (4, 4, 20), (8, 40, 8)])
def test_the_factors_are_a_singular_value_decomposition(r: int, d_in: int, d_out: int) -> None:
    generator = torch.Generator().manual_seed(r)
    a, b = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
    b[:, 0] *= 1e-3
    found = factorise(a, b)
    torch.testing.assert_close(found.up @ found.rows, b @ a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.rows @ found.rows.T, torch.eye(r), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.up.T @ found.up, torch.diag(found.singular_values**2), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(b @ a)[:r], atol=1e-5, rtol=1e-5)


def test_an_adapter_that_was_never_trained_has_no_singular_values() -> None:
    found = factorise(torch.randn(3, 7), torch.zeros(5, 3))
    assert torch.equal(found.up, torch.zeros(5, 3))
    torch.testing.assert_close(found.rows @ found.rows.T, torch.eye(3), atol=1e-6, rtol=0)


def test_leaves_in_place_change_nothing_and_leave_nothing_behind(tmp_path: Path) -> None:
    model, leaves = bayesian(plain_adapter(tmp_path / "plain", use_rslora=True, rank_pattern={"v_proj": 2}))
    scorer, batch = letters(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    with torch.no_grad():
        expected = scorer.class_logits(batch)
        with leaves.in_place(model):
            assert len(stochastic_layers(model)) == 6
            torch.testing.assert_close(scorer.class_logits(batch), expected, atol=1e-5, rtol=0)
        assert torch.equal(scorer.class_logits(batch), expected)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match="No stochastic layer"):
        stochastic_layers(model)


def test_what_cannot_be_carried_is_refused(tmp_path: Path) -> None:
    for option in ({"lora_bias": True}, {"trainable_token_indices": [1]}, {"target_parameters": ["x"]}):
        with pytest.raises(UserError, match=f"option {next(iter(option))}"):
            scalabl_config(LoraConfig(**option))
    config = scalabl_config(LoraConfig(r=4, target_modules=["q_proj"]), covariance="full")
    for name, shape in (
        ("x.lora_embedding_A", (4, 9)),
        ("x.lora_A.weight", (4, 9, 1)),
        ("x.lora_magnitude_vector", (9,)),
    ):
        with pytest.raises(UserError, match=f"{name}, but only adapters of linear layers"):
            scalabl_tensors({name: torch.ones(shape), "x.lora_B.weight": torch.ones(9, 4)}, config)
    with pytest.raises(UserError, match="no LoRA weights"):
        scalabl_tensors({"x.bias": torch.ones(3)}, config)
    with pytest.raises(UserError, match="r is 6, but an adapted layer has only 5"):
        factorise(torch.ones(6, 9), torch.ones(5, 6))
    with pytest.raises(UserError, match="not finite"):
        factorise(torch.ones(2, 9), torch.full((5, 2), torch.nan))
