"""The average's logits: of low precision, of some layers' particles alone, of a model that breaks midway."""

import pytest
import torch
from tiny_base import adapted, tiny_tokenizer

import scalabl
from scalabl.core.errors import UserError
from scalabl.generation.decoding import decode
from scalabl.generation.fan_out import averaged
from scalabl.predictive.monte_carlo import MonteCarloPredictive, restricted


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_a_bfloat16_models_average_is_not_rounded(tokenizer):
    """Logits of two dozens lie 1/8 apart in bfloat16; the average of particles falls between them."""
    model = adapted().to(torch.bfloat16)
    ids = tokenizer("red blue green", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        with scalabl.particles(model, 6, seed=0):
            each = model(input_ids=ids.repeat(6, 1)).logits.float().log_softmax(-1)
        with averaged(model, MonteCarloPredictive(6, seed=0)):
            average = model(input_ids=ids).logits
    expected = each.exp().mean(dim=0).log()
    torch.testing.assert_close(average.log_softmax(-1)[0], expected, rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_drawn_carry_their_mean(tokenizer):
    """Two rows and two particles, so that a particle a row would go unnoticed."""
    model, draws = adapted(), MonteCarloPredictive(2, seed=3, stochastic_layers="last:1")
    ids = torch.stack([tokenizer(text, return_tensors="pt")["input_ids"][0, :2] for text in ("red", "no")])
    with torch.no_grad():
        with scalabl.particles(model, 2, seed=3), restricted(model, "last:1"):
            each = model(input_ids=ids.repeat(2, 1)).logits.log_softmax(-1).unflatten(0, (2, 2))
        with averaged(model, draws):
            found = model(input_ids=ids).logits.log_softmax(-1)
    torch.testing.assert_close(found, each.exp().mean(dim=0).log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_a_model_that_gives_nan_is_said_and_left_as_it_was(settings, tokenizer):
    model = adapted()
    ids = tokenizer("red", return_tensors="pt")["input_ids"]
    norm = model.get_base_model().model.norm.weight
    with torch.no_grad():
        before, weight = model(input_ids=ids).logits, norm.clone()
        norm[3] = torch.nan
        with pytest.raises(UserError, match="NaN"):
            decode(model, tokenizer, ["red"], MonteCarloPredictive(3), max_new_tokens=3, **settings)
        norm.copy_(weight)
        assert torch.equal(model(input_ids=ids).logits, before)
