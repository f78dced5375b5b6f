"""The plan's activations are what autograd saves, byte for byte."""

from typing import Any

import pytest
import torch
from real_step import ROWS, meta_run, recipe_of, saved_by_the_real_step, saving, state

from scalabl.planning.rows import Rows
from scalabl.training.recipe import Recipe


def compare(recipe: Recipe, rows: Rows = ROWS) -> None:
    real = saved_by_the_real_step(recipe, rows)
    run = meta_run(recipe)
    with saving(state(run.model)) as planned:
        forward, whole = run.training_step(rows, rows.batch)
    # indices are numbers in both, so that they are left out here
    assert planned.bytes(floating=True) == real.bytes(floating=True) > 0
    # what stays is what was saved, the batch's five tensors of integers, its hidden states, and the loss
    integers = 3 * rows.batch * rows.length * 8 + 2 * rows.batch * 8
    hidden = rows.batch * rows.length * 32 * 4 if run.trunk.depth and rows.loss != "tokens" else 0
    assert planned.bytes() <= forward.kept <= planned.bytes() + integers + hidden + 4
    assert forward.kept <= whole.peak


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "mle"},
        {"layers": "last:1"},
        {"gradient_checkpointing": True},
        {"target_modules": "q_proj,v_proj,lm_head"},
    ],
    ids=["scalabl", "plain", "last", "checkpointing", "lm_head"],
)
def test_activations_are_what_autograd_saves(architecture: str, settings: dict[str, Any]) -> None:
    compare(recipe_of(architecture, **settings))


@pytest.mark.parametrize(
    "settings", [{"covariance": "full"}, {"method": "blob"}, {"method": "mc_dropout"}, {"dtype": "bfloat16"}]
)
def test_other_methods_and_precisions(settings: dict[str, Any]) -> None:
    compare(recipe_of(**settings))


@pytest.mark.parametrize("loss", ["letters", "tokens"])
def test_other_losses(loss: str) -> None:
    compare(recipe_of(), Rows(3, 24, loss))


def test_eager_attention_saves_its_probabilities() -> None:
    """The model's own code is run: a plan of another attention is another plan."""
    run, eager = meta_run(recipe_of()), meta_run(recipe_of())
    eager.model.get_base_model().set_attn_implementation("eager")
    (sdpa, _), (own, _) = run.training_step(ROWS, 3), eager.training_step(ROWS, 3)
    one = 3 * 4 * 24 * 24 * 4  # (B, H, T, T) float32 in each of 3 layers
    assert own.kept - sdpa.kept > 2 * 3 * one


def test_automatic_mixed_precision_casts_as_torch_does() -> None:
    recipe = recipe_of(dtype="bfloat16", method="mle")
    run = meta_run(recipe, "cuda")
    with saving(state(run.model)) as planned:
        run.training_step(ROWS, 3)
    # under autocast PEFT hands the adapter its input as it is, in bfloat16; the masks' copies are CUDA's own
    assert not torch.is_autocast_enabled("cuda")
    wide = [t for t in planned.tensors.values() if t.dtype == torch.float32 and t.shape == (3, 24, 32)]
    plain = meta_run(recipe)
    with saving(state(plain.model)) as without:
        plain.training_step(ROWS, 3)
    without_autocast = [t for t in without.tensors.values() if t.dtype == torch.float32 and t.shape == (3, 24, 32)]
    assert len(without_autocast) - len(wide) == 6  # q and v of three layers


def test_the_choices_of_a_row_stand_at_its_end() -> None:
    batch = Rows(2, 10, scored=5, choices=3).of(2)
    assert batch.segments.tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 2, 3]] * 2
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 6, 5]] * 2
    assert (batch.keep, batch.num_choices.tolist()) == (6, [3, 3])
    short = Rows(1, 3, scored=50, choices=4).of(1)
    assert short.segments.tolist() == [[0, 1, 2]]
