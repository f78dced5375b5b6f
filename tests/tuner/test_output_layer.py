"""An adapted output layer, with weights of its own or shared with the input embedding."""

import warnings
from pathlib import Path

import pytest
import torch
from matrix import adapt, close, load_base, logits, perturb, tokens
from peft import PeftModel
from transformers import AutoModelForCausalLM

import scalabl
from scalabl.tuner import stochastic_layers

IDS = tokens(2)
TIED = {"tie_word_embeddings": True}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),  # PEFT's advice on merging: see below
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


@pytest.fixture(params=[{}, TIED], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> PeftModel:
    return adapt(load_base(**request.param), target_modules=["q_proj", "lm_head"]).eval()


def reloaded(path: Path, tied: bool) -> PeftModel:
    return PeftModel.from_pretrained(load_base(**(TIED if tied else {})), str(path)).eval()


def is_tied(model: PeftModel) -> bool:
    return bool(model.config.tie_word_embeddings)


def test_the_output_layer_is_stochastic_and_its_embedding_untouched(model: PeftModel) -> None:
    assert "lm_head" in stochastic_layers(model)
    perturb(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.get_base_layer().weight is embedding.weight) == is_tied(model)
    hidden = model.base_model.model.model(input_ids=IDS).last_hidden_state
    base = hidden @ head.get_base_layer().weight.T
    with scalabl.particles(model, 2, seed=0):
        drawn = head(hidden)
        s = stochastic_layers(model)["lm_head"].draw(2, hidden.device)
    rows, up = head.lora_A["default"].rows(), head.lora_B["default"].weight
    assert close(drawn, base + 2.0 * ((hidden @ rows.T) * s[:, None]) @ up.T, 1e-5)


def test_logits_to_keep_keeps_the_rows_draws(model: PeftModel) -> None:
    with scalabl.particles(model, 2, seed=0):
        assert close(logits(model, IDS, logits_to_keep=1), logits(model, IDS)[:, -1:], 1e-5)
        assert close(logits(model, IDS, logits_to_keep=torch.tensor([1, 3])), logits(model, IDS)[:, [1, 3]], 1e-5)


def test_saving_loading_and_the_mean_directory(model: PeftModel, tmp_path: Path) -> None:
    answer = logits(model, IDS)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(reloaded(tmp_path, is_tied(model)), IDS), answer)
    assert close(logits(reloaded(tmp_path / "mean", is_tied(model)), IDS), answer, 1e-5)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_leaves_the_input_embedding_alone(model: PeftModel, safe_merge: bool, tmp_path: Path) -> None:
    """PEFT adds to the shared tensor in place, which changes what the model reads as well."""
    answer, embedding = logits(model, IDS), model.get_input_embeddings().weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied after merging")
        merged = model.merge_and_unload(safe_merge=safe_merge)
    assert close(logits(merged, IDS), answer, 1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), IDS), answer, 1e-5)


def test_merging_in_place_and_back(model: PeftModel) -> None:
    answer, embedding = logits(model, IDS), model.get_input_embeddings().weight.clone()
    model.merge_adapter()
    assert close(logits(model, IDS), answer, 1e-5)
    model.unmerge_adapter()
    assert close(logits(model, IDS), answer, 1e-5)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
