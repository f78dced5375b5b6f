"""When a stochastic layer draws: while it is trained, in the mode of its model, and never when it is merged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from tiny_base import require_peft, tiny_base
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

import scalabl

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def base() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_base()).eval()
    return model


def config(**options: Any) -> scalabl.ScalaBLConfig:
    return scalabl.ScalaBLConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)


def adapted() -> PeftModel:
    """A tiny model with an adapter whose draws move the logits."""
    torch.manual_seed(0)
    return get_peft_model(base(), config()).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def added(directory: Path) -> Any:
    model = adapted()
    model.add_adapter("b", config())
    model.set_adapter("b")
    return model


def loaded_to_train(directory: Path) -> Any:
    model = adapted()
    model.load_adapter(str(directory), "b", is_trainable=True)
    model.set_adapter("b")
    return model


def injected(directory: Path) -> Any:
    return inject_adapter_in_model(config(), base())


def by_transformers(directory: Path) -> Any:
    require_peft()
    model = base()
    model.add_adapter(config(), "b")
    return model


def from_adapter_directory(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


def of_pipeline(directory: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base())
    return pipeline("text-generation", model=str(directory), tokenizer=tokenizer, device="cpu").model


def loaded_by_transformers(directory: Path) -> Any:
    model = base()
    model.load_adapter(str(directory), "b", is_trainable=True)
    return model


@pytest.mark.parametrize(
    "make",
    [
        added,
        loaded_to_train,
        injected,
        by_transformers,
        loaded_by_transformers,
        from_adapter_directory,
        of_pipeline,
    ],
)
def test_an_adapter_takes_the_mode_of_the_model_that_it_is_put_into(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    saved = adapted()
    saved.peft_config["default"].base_model_name_or_path = str(tiny_base())
    saved.save_pretrained(str(tmp_path))
    model = make(tmp_path)
    assert not model.training
    with scalabl.mean(model):
        mean = logits(model)
    assert torch.equal(logits(model), mean) and torch.equal(logits(model), mean)
    model.train()
    for p in model.parameters():
        p.requires_grad_(True)
    assert not torch.equal(logits(model), logits(model))


def test_a_frozen_adapter_gives_its_mean_while_others_train() -> None:
    model = adapted()
    mean = logits(model)
    model.train()
    assert not torch.equal(logits(model), mean)
    model.requires_grad_(False)
    torch.testing.assert_close(logits(model), mean)
    with scalabl.sample(model):  # what is named is done
        assert not torch.equal(logits(model), mean)


@pytest.mark.parametrize("verb", ["particles", "sample", "kl"])
def test_a_merged_adapter_is_refused(verb: str) -> None:
    model = adapted()
    mean = logits(model)
    model.merge_adapter()
    with pytest.raises(scalabl.UserError, match="merged into its base.*unmerge_adapter"):
        {
            "particles": lambda: scalabl.particles(model, 2).__enter__(),
            "sample": lambda: scalabl.sample(model).__enter__(),
            "kl": lambda: scalabl.kl_divergence(model),
        }[verb]()
    with scalabl.mean(model):  # what was merged
        torch.testing.assert_close(logits(model), mean, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert scalabl.kl_divergence(model) > 0
    with model.disable_adapter(), pytest.raises(scalabl.UserError, match="disabled"):
        scalabl.particles(model, 2).__enter__()


def test_a_merged_adapter_is_saved_as_it_was(tmp_path: Path) -> None:
    model = adapted()
    with scalabl.particles(model, 2, seed=0):
        drawn = logits(model)
    model.merge_adapter()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    with scalabl.particles(loaded, 2, seed=0):
        assert torch.equal(logits(loaded), drawn)
    plain = PeftModel.from_pretrained(base(), str(tmp_path / "mean")).eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)


def test_an_injected_adapter_has_its_mean_its_particles_and_its_kl() -> None:
    expected = adapted()
    torch.manual_seed(0)
    model = inject_adapter_in_model(config(), base())
    torch.testing.assert_close(scalabl.kl_divergence(model), scalabl.kl_divergence(expected))
    with scalabl.mean(model), scalabl.mean(expected):
        assert torch.equal(logits(model.train()), logits(expected))
    with scalabl.particles(model, 2, seed=3), scalabl.particles(expected, 2, seed=3):
        assert torch.equal(logits(model), logits(expected))
