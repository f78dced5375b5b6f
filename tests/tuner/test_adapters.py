"""Several adapters on one model; saving, loading, copying."""

import json
from pathlib import Path

import pytest
import torch
from matrix import adapt, close, load_base, logits, perturb, tokens
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

import scalabl
from scalabl.core.errors import UserError
from scalabl.posterior import Prior
from scalabl.tuner import stochastic_layers

IDS = tokens(2)


def other_config(**options: object) -> scalabl.ScalaBLConfig:
    settings: dict[str, object] = {"r": 2, "target_modules": ["q_proj", "o_proj"], "covariance": "full", **options}
    return scalabl.ScalaBLConfig(**settings)


def two_adapters() -> PeftModel:
    model = adapt(load_base(), prior_std=0.5).eval()
    model.add_adapter("other", other_config(prior_mean=0.2))
    perturb(model, "other", seed=6)
    return model.eval()


def test_names_in_the_file_carry_no_adapter_name() -> None:
    model = adapt(load_base(), covariance="full", layers_to_transform=[1], target_modules=["v_proj"])
    layer = "base_model.model.model.layers.1.self_attn.v_proj"
    expected = {
        f"{layer}.lora_A.direction": (4, 64),
        f"{layer}.lora_A.posterior.log_mean": (4,),
        f"{layer}.lora_A.posterior.log_std": (4,),
        f"{layer}.lora_A.posterior.lower": (6,),
        f"{layer}.lora_B.weight": (32, 4),
    }
    assert {name: tuple(t.shape) for name, t in get_peft_model_state_dict(model).items()} == expected


def test_switching_deleting_and_disabling() -> None:
    base_answer = logits(load_base(), IDS)
    model = two_adapters()
    first = logits(model, IDS)
    assert list(stochastic_layers(model)) == list(stochastic_layers(model, "default"))
    model.set_adapter("other")
    second = logits(model, IDS)
    assert {name.rpartition(".")[2] for name in stochastic_layers(model)} == {"q_proj", "o_proj"}
    assert not close(first, second, 1e-3)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".other." in n
    }
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), base_answer)
    model.set_adapter("default")
    assert torch.equal(logits(model, IDS), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model, IDS), first)
    with pytest.raises(UserError, match="No stochastic layer in adapter other"):
        stochastic_layers(model, "other")


def test_two_active_adapters_add_up_draw_apart_and_keep_their_priors() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    layers = stochastic_layers(model)
    assert len(layers) == 8 and "model.layers.0.self_attn.q_proj.other" in layers
    expected = sum(leaf.posterior.kl(Prior(0.577, 0.5)) for leaf in stochastic_layers(model, "default").values())
    expected = expected + sum(leaf.posterior.kl(Prior(0.2, 0.2)) for leaf in stochastic_layers(model, "other").values())
    assert torch.allclose(scalabl.kl_divergence(model), expected)
    with scalabl.particles(model, 2, seed=0):
        assert not any(leaf.state == "auto" for leaf in layers.values())
        drawn = logits(model, IDS)
    assert not close(drawn[0], drawn[1], 1e-3)
    answer = logits(model, IDS)
    assert close(logits(model.merge_and_unload(adapter_names=["default", "other"]), IDS), answer, 1e-5)


@pytest.mark.parametrize("how", ["peft", "layers"])
def test_switching_among_particles_is_refused_and_goes_with_the_mean_and_with_draws(how: str) -> None:
    model = two_adapters()
    model.set_adapter("other")
    expected = logits(model, IDS)
    model.set_adapter("default")

    def switch() -> None:
        if how == "peft":
            model.set_adapter("other")
        else:
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    layer.set_adapter("other")

    with scalabl.particles(model, 2, seed=0):
        drawn = logits(model, IDS)
        switch()
        with pytest.raises(UserError, match="changed among particles.* call set_adapter before scalabl.particles"):
            logits(model, IDS)
        model.set_adapter("default")
        with pytest.raises(UserError, match="third cannot be added among another one's particles"):
            model.add_adapter("third", other_config())
        assert torch.equal(logits(model, IDS), drawn)
    model.train()
    with scalabl.mean(model):
        switch()
        assert torch.equal(logits(model, IDS), expected)
        model.set_adapter("default")
    model.eval()
    with scalabl.sample(model):
        switch()
        assert not close(logits(model, IDS), logits(model, IDS), 1e-3)
    model.set_adapter("other")
    assert torch.equal(logits(model, IDS), expected)


@pytest.mark.parametrize("name", ["a b", "direction", "lora_A", "q_proj", "ünï"])
def test_an_adapter_of_any_other_name_is_saved_and_found(name: str, tmp_path: Path) -> None:
    model = adapt(load_base()).eval()
    model.add_adapter(name, other_config())
    perturb(model, name, seed=6)
    model.set_adapter(name)
    with scalabl.particles(model, 2, seed=0):
        drawn = logits(model, IDS)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load_base(), str(tmp_path / name), adapter_name=name).eval()
    with scalabl.particles(loaded, 2, seed=0):
        assert torch.equal(logits(loaded, IDS), drawn)
    plain = PeftModel.from_pretrained(load_base(), str(tmp_path / name / "mean")).eval()
    assert close(logits(plain, IDS), logits(model, IDS), 1e-5)


def test_mixed_batches_of_adapters_carry_each_rows_own() -> None:
    model = two_adapters()
    first = logits(model, IDS)
    model.set_adapter("other")
    second = logits(model, IDS)
    model.set_adapter("default")
    mixed = logits(model, IDS, adapter_names=["default", "other"])
    assert close(mixed, torch.stack([first[0], second[1]]), 1e-5)


def test_each_adapter_is_saved_with_its_own_mean_and_loaded_beside_the_other(tmp_path: Path) -> None:
    model = two_adapters()
    first = logits(model, IDS)
    model.set_adapter("other")
    second = logits(model, IDS)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load_base(), str(tmp_path)).eval()
    loaded.load_adapter(str(tmp_path / "other"), "second")
    assert torch.equal(logits(loaded, IDS), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, IDS), second)
    plain = PeftModel.from_pretrained(load_base(), str(tmp_path / "other" / "mean")).eval()
    assert close(logits(plain, IDS), second, 1e-5)


def test_merging_and_unmerging_in_place() -> None:
    model = adapt(load_base()).eval()
    answer = logits(model, IDS)
    model.merge_adapter()
    assert close(logits(model, IDS), answer, 1e-5)
    model.unmerge_adapter()
    assert close(logits(model, IDS), answer, 1e-5)
    model.merge_adapter(safe_merge=True)
    assert close(logits(model, IDS), answer, 1e-5)


def test_merging_while_drawing_takes_the_mean() -> None:
    model = adapt(load_base()).eval()
    answer = logits(model, IDS)
    with scalabl.particles(model, 2, seed=0):
        merged = model.train().merge_and_unload()
    assert close(logits(merged.eval(), IDS), answer, 1e-5)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_restores_every_number(covariance: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = adapt(load_base(), covariance=covariance).eval()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load_base(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage).eval()
    saved, found = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    again = PeftModel.from_pretrained(load_base(), str(tmp_path), is_trainable=True)
    assert all(p.requires_grad == (".default." in n) for n, p in again.named_parameters())


def test_a_bfloat16_adapter_keeps_its_variational_numbers_in_float32(tmp_path: Path) -> None:
    from matrix import FORMATS

    torch.manual_seed(0)
    base = load_base(form=FORMATS[1])
    model = get_peft_model(base, other_config(), autocast_adapter_dtype=False)
    perturb(model)
    dtypes = {name.rpartition(".default.")[2]: t.dtype for name, t in model.named_parameters() if ".default." in name}
    assert dtypes["direction"] == torch.bfloat16
    assert {dtypes[f"posterior.{name}"] for name in ("log_mean", "log_std", "lower")} == {torch.float32}
    answer = logits(model.eval(), IDS)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load_base(form=FORMATS[1]), str(tmp_path), autocast_adapter_dtype=False).eval()
    assert torch.equal(logits(loaded, IDS), answer)


def test_the_mean_directory_is_a_plain_lora_with_the_mean_folded_in(tmp_path: Path) -> None:
    model = adapt(load_base(), unit_rows=False)
    model.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "mean" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not {"covariance", "prior_std", "base_fingerprint"} & config.keys()
    tensors: dict[str, Tensor] = load_file(tmp_path / "mean" / "adapter_model.safetensors")
    assert {name.partition("_proj.")[2] for name in tensors} == {"lora_A.weight", "lora_B.weight"}
    for name, leaf in stochastic_layers(model).items():
        folded = leaf.posterior.mean[:, None] * leaf.direction
        assert torch.allclose(tensors[f"base_model.model.{name}.lora_A.weight"], folded, atol=1e-6)
    assert sorted(p.name for p in (tmp_path / "mean").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_configuration_alone_writes_no_mean(tmp_path: Path) -> None:
    scalabl.ScalaBLConfig().save_pretrained(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = adapt(load_base())
    with pytest.raises(UserError, match="safetensors alone: delete .*adapter_model.bin"):
        model.save_pretrained(str(tmp_path), safe_serialization=False)
    assert not (tmp_path / "adapter_config.json").exists()


def test_one_configuration_serves_several_bases() -> None:
    config = other_config()
    get_peft_model(load_base(seed=0), config)
    get_peft_model(load_base(seed=1), config)
    assert config.base_fingerprint is None
