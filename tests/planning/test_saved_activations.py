"""The plan's activations are what autograd saves, byte for byte."""

from typing import Any

import pytest
import torch
from real_step import ROWS, meta_run, saved_by_the_real_step, saving, settings_of, state

from scalabl.planning.step import PlannedRows
from scalabl.runs.settings import Settings


def compare(settings: Settings, rows: PlannedRows = ROWS, *, attention: str = "sdpa", autocast: bool = False) -> None:
    real = saved_by_the_real_step(settings, rows, attention=attention, autocast=autocast)
    run = meta_run(settings)
    run.model.get_base_model().set_attn_implementation(attention)
    with saving(state(run.model)) as planned:
        forward, whole = run.training_step(rows, rows.batch)
    # indices are numbers in both, so that they are left out here
    assert planned.bytes(floating=True) == real.bytes(floating=True) > 0
    # what stays is what was saved, the batch's five tensors of integers, its hidden states, and the loss
    others = 3 * rows.batch * rows.length * 8 + 2 * rows.batch * 8 + 4
    if run.trunk.depth and rows.loss != "tokens":
        others += rows.batch * rows.length * 32 * 4
    if settings.optimisation.gradient_checkpointing:
        # the mask, cosines and sines of two kinds, for the layers that are run again
        others += rows.batch * rows.length * (rows.length + 2 * 2 * 8) * 4
    assert planned.bytes() <= forward.kept <= planned.bytes() + others
    assert forward.kept <= whole.peak


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "mle"},
        {"layers": "last:1"},
        {"gradient_checkpointing": True},
        {"target_modules": "q_proj,v_proj,lm_head"},
    ],
    ids=["scalabl", "plain", "last", "checkpointing", "lm_head"],
)
def test_activations_are_what_autograd_saves(architecture: str, changes: dict[str, Any]) -> None:
    compare(settings_of(architecture, **changes))


@pytest.mark.parametrize(
    "changes", [{"covariance": "full"}, {"method": "blob"}, {"method": "mc_dropout"}, {"dtype": "bfloat16"}]
)
def test_other_methods_and_precisions(changes: dict[str, Any]) -> None:
    compare(settings_of(**changes))


@pytest.mark.parametrize("changes", [{"bits": 4}, {"bits": 8}, {"bits": 8, "quantization": "torchao"}])
def test_quantised_layers_save_what_the_real_ones_do(changes: dict[str, Any]) -> None:
    pytest.importorskip(changes.get("quantization", "bitsandbytes"))
    settings = settings_of(dtype="bfloat16", **changes)
    real = saved_by_the_real_step(settings, ROWS)
    run = meta_run(settings)
    with saving(state(run.model)) as planned:
        run.training_step(ROWS, 3)
    assert planned.bytes(floating=True) == real.bytes(floating=True) > 0


@pytest.mark.parametrize("loss", ["letters", "tokens"])
def test_other_losses(loss: str) -> None:
    compare(settings_of(), PlannedRows(3, 24, loss))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_eager_attention_saves_its_probabilities(architecture: str) -> None:
    compare(settings_of(architecture), attention="eager")


@pytest.mark.parametrize("method", ["scalabl", "mle"])
def test_automatic_mixed_precision_casts_as_torch_does(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalabl.planning.step.autocast_dtype", lambda settings, device: torch.bfloat16)
    compare(settings_of(method=method, dtype="bfloat16"), autocast=True)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("rows", [ROWS, PlannedRows(3, 24, "tokens")])
def test_cudas_kernels_save_what_they_are_given(rows: PlannedRows) -> None:
    """Its masks are copied to rows of a multiple of eight in each layer, where the length is none; else nothing is."""
    settings = settings_of(dtype="float16")
    run = meta_run(settings, "cuda")
    with saving(state(run.model)) as planned:
        run.training_step(rows, 3)
    on_cpu = saved_by_the_real_step(settings, rows).bytes(floating=True)
    masks = 3 * 24 * 24 * 2
    assert abs(planned.bytes(floating=True) - on_cpu) <= masks
    odd = PlannedRows(3, 25, rows.loss)
    with saving(state(run.model)) as longer:
        run.training_step(odd, 3)
    masks_of = [t for t in longer.tensors.values() if t.shape[-2:] == (25, 25)]
    sizes = [t.untyped_storage().nbytes() for t in masks_of]
    assert sizes == ([] if rows.loss == "tokens" else [3 * 25 * 32 * 2] * 3)


def test_the_choices_of_a_row_stand_at_its_end() -> None:
    batch = PlannedRows(2, 10, scored=5, choices=3).of(2)
    assert batch.segments.tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 2, 3]] * 2
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 6, 5]] * 2
    assert (batch.keep, batch.num_choices.tolist()) == (6, [3, 3])
    short = PlannedRows(1, 3, scored=50, choices=4).of(1)
    assert short.segments.tolist() == [[0, 1, 2]]
